"""A LiT that draws icons inherits all but attention from the PixArt of lit/icons_donor and is distilled from it.

    heirloom train lit/icons_donor --run runs/icons_donor                     # the donor first: hours of two CPU cores
    heirloom train lit/icons --run runs/icons                                 # with inheritance and distillation
    heirloom train lit/icons --run runs/scratch --donor "" --teacher ""       # the same from scratch

Two heads of 96 with linear attention replace six of 32. A few minutes of two CPU cores; not measured yet.
"""

from dataclasses import replace

from heirloom.configs.lit.icons_donor import get_config as donor
from lit_jax.text_recipe import Config
from lit_jax.zoo import icons_lit


def get_config() -> Config:
    cfg = donor()
    return replace(
        cfg,
        student=icons_lit(),
        donor="runs/icons_donor/model",
        teacher="runs/icons_donor/model",
        keep="none",
        optim=replace(cfg.optim, lr=1e-3, warmup=20),
        step=replace(cfg.step, ema=0.98),
        prompts=(),
        steps=400,
        log_every=20,
        eval_every=50,
        save_every=400,
    )

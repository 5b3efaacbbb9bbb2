"""The demo: a LiT inherits all but attention from the embedded PixArt and is distilled from it; it draws icons.

    heirloom train lit/icons --run runs/icons                                 # with inheritance and distillation
    heirloom train lit/icons --run runs/scratch --donor "" --teacher ""       # the same from scratch

Two heads of 96 with linear attention replace six of 32. `heirloom demo lit` runs both arms.
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
        donor="embedded:t2i_donor",
        teacher="embedded:t2i_donor",
        keep="none",
        optim=replace(cfg.optim, warmup=100),
        step=replace(cfg.step, ema=0.99),
        prompts=(),
        steps=1200,
        log_every=50,
        eval_every=100,
        save_every=1200,
    )

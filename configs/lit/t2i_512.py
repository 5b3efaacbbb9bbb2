"""The text-to-image LiT-0.6B at 512 px, inherited from PixArt-Σ and distilled from it (LiT §4.2).

    heirloom cache lit/t2i_512 data/t2i_512 --data.path "pairs/{00000..00999}.tar" --data.columns sharegpt4v
    heirloom train lit/t2i_512 --run runs/lit_t2i_512 --data.path data/t2i_512/train
    heirloom inherit lit/t2i_512 lit_t2i_512        # without training: it draws noise

`cache` needs `--autoencoder PIPELINE/vae --text-encoder PIPELINE/text_encoder`, parts of the donor's pipeline.
Expected: GenEval 0.47 (LiT, Table 7; PixArt-Σ 0.52), after 106,000 steps with a batch of 384. The paper's data is not
public, and its hardware is not told. On a v5e-64 with `--mesh.fsdp 8` a step takes 0.3 s at least, the run 9 hours (an
estimate of the compiler, docs/compile.md; not run). The donor's licence (CreativeML Open RAIL++-M) passes on to the
student.
"""

from lit_jax.recipes import text_to_image
from lit_jax.text_recipe import Config
from lit_jax.zoo import PIXART_512, text_lit


def get_config() -> Config:
    return text_to_image(text_lit(512), donor=PIXART_512, teacher=PIXART_512, steps=106_000, batch=384)

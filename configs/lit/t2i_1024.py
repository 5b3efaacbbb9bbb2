"""The text-to-image LiT-0.6B at 1024 px (LiT §4.2): it goes on from the LiT of 512 px.

    heirloom train lit/t2i_1024 --run runs/lit_t2i_1024 --data.path data/t2i_1024/train
    heirloom inherit lit/t2i_1024 lit_t2i_1024 --donor PixArt-Sigma-XL-2-1024-MS --keep o      # from the donor itself

`lit/t2i` trains both stages. Expected: GenEval 0.48, after 155,000 steps with a batch of 96 from LiT-512. The cache is
made as for lit/t2i_512. On a v5e-32 it fits with `--mesh.fsdp 8 --step.accumulate 3`; a step takes 0.6 s at least, the
run 27 hours (an estimate of the compiler, docs/compile.md; not run). The donor's licence (CreativeML Open RAIL++-M)
passes on to the student.
"""

from lit_jax.recipes import text_to_image
from lit_jax.text_recipe import Config
from lit_jax.zoo import PIXART_1024, text_lit


def get_config() -> Config:
    donor = "runs/lit_t2i_512/model"
    return text_to_image(text_lit(1024), donor=donor, keep="all", teacher=PIXART_1024, steps=155_000, batch=96)

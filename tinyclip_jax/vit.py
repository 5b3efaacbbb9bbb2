"""timm's ViT, with its options, as the image tower of a CLIP (SigLIP, MobileCLIP2, and others of open_clip)."""

from dataclasses import dataclass, replace
from typing import Literal

import jax
from flax import nnx

from heirloom.common.errors import InputError
from heirloom.common.nn.attention import Kernel
from heirloom.common.nn.block import Remat, scan
from heirloom.common.nn.dense import Dense, Sizes, normal, zeros
from heirloom.common.vit.model import Vit, VitConfig

Projection = Literal["linear", "affine", "none"]
# Fields of a ViT that an image tower does not have, with the values that switch them off.
_FIXED = {
    "size_width": None, "any_size": False, "channels": 3, "classes": 0, "gene": "none", "drop_path": 0.0,
    "pooler": False, "joint": 0,
}  # fmt: skip


@dataclass(frozen=True)
class VitImageConfig(VitConfig):
    """The image tower: timm's ViT with its options, over square pictures."""

    classes: int = 0
    """Always 0: an image tower has a projection in place of a head."""
    projection: Projection = "linear"
    """From the width to the joint embedding: linear, affine (with a bias), or none (SigLIP)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                what = f"{name} is {getattr(self, name)!r}, and the image tower of a CLIP needs {value!r}"
                raise InputError(f"{what}: set image.{name} to it")


class VitTower(Vit):
    """The ViT without its head: images [batch, size, size, 3] to features [batch, joint]."""

    def __init__(self, cfg: VitImageConfig, joint: int, *, remat: Remat, kernel: Kernel, rngs: nnx.Rngs):
        super().__init__(replace(cfg, remat=remat, kernel=kernel), rngs=rngs)
        last = projection(cfg.projection, dict(embed=cfg.width, joint=joint), rngs=rngs)
        # In place of the ViT's own, which has no bias and takes its size from the config of the ViT.
        self.projection = None if last is None else nnx.data(last)

    def __call__(self, images: jax.Array, keep: None = None) -> jax.Array:  # type: ignore[override]
        """Features of normalised images. keep: always None; learned masks need CLIP's own ViT."""
        x = self.pooled(scan(self.blocks, self.embed(images), remat=self.cfg.remat))
        return x if self.projection is None else self.projection(x)


def projection(kind: Projection, sizes: Sizes, *, rngs: nnx.Rngs) -> Dense | None:
    """The last layer of a tower, from its width to the joint embedding; None for "none"."""
    if kind == "none":
        return None
    bias = zeros if kind == "affine" else None
    return Dense("embed -> joint", sizes, init=normal(sizes["embed"] ** -0.5), bias=bias, rngs=rngs)

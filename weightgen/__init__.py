"""Weights from a data set (D2NWG, arXiv 2402.18153): a zoo of trained networks, latent diffusion over weights.

zoo = weightgen.train("weightgen/zoo", members=1000)
run = weightgen.train("weightgen/generator", zoo=zoo.folder / "zoo")
networks = run.model.generate({"cat": [...], "dog": [...], ...})
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightgen.pretrained import Networks, Pretrained, load, train

__all__ = ["Networks", "Pretrained", "load", "train"]


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this package for its list of verbs, and must not wait for jax.
    if name in __all__:
        from heirloom.common.notebook.modules import public

        return public(__name__, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

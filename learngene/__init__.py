"""SWS (arXiv 2404.16897): one auxiliary ViT is trained with a few shared blocks, which then start ViTs of any depth.

run = learngene.train("learngene/smoke")
vit = learngene.expand(run.model, depth=9)
learngene.compare("learngene/emoji", depths=(4, 8)).plot()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learngene.pretrained import Compared, Pretrained, compare, evaluate, expand, load, train

__all__ = ["Compared", "Pretrained", "compare", "evaluate", "expand", "load", "train"]


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this package for its list of verbs, and must not wait for jax.
    if name in __all__:
        from heirloom.common.notebook.modules import public

        return public(__name__, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

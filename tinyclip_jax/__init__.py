"""TinyCLIP (arXiv 2309.12314): affinity mimicking and weight inheritance for CLIP models.

clip = tinyclip_jax.load("hf:openai/clip-vit-base-patch32")
similarity = clip.encode_image(pictures) @ clip.encode_text(["a cat", "a dog"]).T
student = tinyclip_jax.inherit_from(clip, "vit_40m_32")
run = tinyclip_jax.train("tinyclip/emoji", steps=50)
tinyclip_jax.evaluate(run.model)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyclip_jax.pretrained import Pretrained, evaluate, inherit_from, load, train

__all__ = ["Pretrained", "evaluate", "inherit_from", "load", "train"]


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this package for its list of verbs, and must not wait for jax.
    if name in __all__:
        from heirloom.common.notebook.modules import public

        return public(__name__, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

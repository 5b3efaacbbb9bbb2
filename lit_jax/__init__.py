"""LiT, the linear diffusion transformer (arXiv 2501.12976): a DiT that inherits everything but its self-attention.

lit = lit_jax.load("hf:facebook/DiT-XL-2-256/transformer", autoencoder="hf:stabilityai/sd-vae-ft-ema")
pictures = lit.sample([207, 360], count=4, steps=50, guidance=4.0)
latents = lit_jax.load("hf:stabilityai/sd-vae-ft-ema").encode(pictures)
run = lit_jax.train("lit/digits", steps=100)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_jax.pretrained import Pretrained, PretrainedAutoencoder, load, train

__all__ = ["Pretrained", "PretrainedAutoencoder", "load", "train"]


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this package for its list of verbs, and must not wait for jax.
    if name in __all__:
        from heirloom.common.notebook.modules import public

        return public(__name__, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

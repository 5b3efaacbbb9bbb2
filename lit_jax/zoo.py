"""Models by name: the published sizes of DiT and LiT, and where their weights are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.convert import Donor, Family, Outline, open_donor
from heirloom.common.checkpoint.hub import locate
from heirloom.common.nn.functional import functional
from lit_jax.autoencoder_layouts import FAMILY as AUTOENCODERS
from lit_jax.dit import SOFTMAX_HEADS, Dit, DitConfig, macs, parameters
from lit_jax.formats import FORMATS, LOOKALIKES, config, sidecars
from lit_jax.verify import verify

EMBEDDED = {"digits_dit": Path(__file__).parent / "digits_dit"}

FAMILY = Family(
    name="lit",
    module=Dit,
    config=config,
    formats=FORMATS,
    sidecars=sidecars,
    verify=verify,
    parameters=parameters,
    macs=macs,
    embedded=EMBEDDED,
    lookalikes=LOOKALIKES,
)
FAMILIES = (FAMILY, AUTOENCODERS)

LINEAR_HEADS = {384: 2, 768: 3, 1024: 4, 1152: 4}
_SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}

# Sources of the recipes. DiT's weights are CC-BY-NC 4.0, and so is what inherits from them.
DIT_XL_2_256 = "hf:facebook/DiT-XL-2-256/transformer"
DIT_XL_2_512 = "hf:facebook/DiT-XL-2-512/transformer"
AUTOENCODER = "hf:stabilityai/sd-vae-ft-ema"


def dit(size: str, patch: int = 2, pixels: int = 256) -> DitConfig:
    """A published DiT: `size` s, b, l or xl, over latents of an autoencoder that shrinks pictures eight times."""
    width, layers = _SIZES[size]
    return DitConfig(pixels // 8, 4, patch, width, layers, SOFTMAX_HEADS[width], 4 * width)


def lit(size: str, patch: int = 2, pixels: int = 256) -> DitConfig:
    """Its LiT: few-head linear attention, everything else alike."""
    cfg = dit(size, patch, pixels)
    return replace(cfg, heads=LINEAR_HEADS[cfg.width], attention="linear")


PUBLISHED = {DIT_XL_2_256: dit("xl"), DIT_XL_2_512: dit("xl", pixels=512)}


def outline(source: str) -> Donor | Outline:
    """A teacher for `heirloom compile`: published ones need not be fetched for their shapes."""
    cfg = PUBLISHED.get(source)
    return Outline(FAMILY, cfg, functional(Dit, cfg)) if cfg else open_dit(source)


def open_dit(source: str, **overrides: Any) -> Donor:
    """Any DiT or LiT by SOURCE, opened lazily. Raises InputError when it is not there or is none."""
    return open_donor(locate(source, EMBEDDED), [FAMILY], **overrides)

"""Published sizes of DiT and LiT, and the sources of their weights."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor, Family, Outline
from heirloom.common.checkpoint.hub import locate
from heirloom.common.checkpoint.pipeline import is_pipeline, main_part
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.typed import from_json
from lit_jax import pixart, pixart_formats, pixart_verify
from lit_jax.autoencoder_layouts import FAMILY as AUTOENCODERS
from lit_jax.dit import SOFTMAX_HEADS, Dit, DitConfig, macs, parameters
from lit_jax.formats import FORMATS, LOOKALIKES, sidecars
from lit_jax.pixart import PixArt, PixArtConfig, published_interpolation
from lit_jax.text.layouts import FAMILY as T5
from lit_jax.verify import predictions, verify

EMBEDDED = {"digits_dit": Path(__file__).parent / "digits_dit"}
ICONS = Path(__file__).parent / "icons"
TEXT_EMBEDDED = {"t2i": ICONS / "lit", "t2i_donor": ICONS / "pixart"}

FAMILY = Family(
    name="lit",
    module=Dit,
    config=partial(from_json, DitConfig),
    formats=FORMATS,
    sidecars=sidecars,
    verify=verify,
    parameters=parameters,
    macs=macs,
    outputs=predictions,
    embedded=EMBEDDED,
    lookalikes=LOOKALIKES,
)
PIXART = Family(
    name="pixart",
    module=PixArt,
    config=partial(from_json, PixArtConfig),
    formats=pixart_formats.FORMATS,
    sidecars=sidecars,
    verify=pixart_verify.verify,
    parameters=pixart.parameters,
    macs=pixart.macs,
    outputs=pixart_verify.predicted,
    embedded=TEXT_EMBEDDED,
)
FAMILIES = (FAMILY, PIXART, AUTOENCODERS, T5)

LINEAR_HEADS = {384: 2, 768: 3, 1024: 4, 1152: 4}
_SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}

# Sources of the recipes. DiT's weights are CC-BY-NC 4.0, and so are models that inherit from them.
DIT_XL_2_256 = "hf:facebook/DiT-XL-2-256/transformer"
DIT_XL_2_512 = "hf:facebook/DiT-XL-2-512/transformer"
AUTOENCODER = "hf:stabilityai/sd-vae-ft-ema"


def dit(size: str, patch: int = 2, pixels: int = 256) -> DitConfig:
    """Return the config of a published DiT: `size` is s, b, l or xl; its latents are 8 times smaller than the
    pictures.
    """
    width, layers = _SIZES[size]
    heads, hidden = SOFTMAX_HEADS[width], 4 * width
    return DitConfig(size=pixels // 8, channels=4, patch=patch, width=width, layers=layers, heads=heads, hidden=hidden)


def lit(size: str, patch: int = 2, pixels: int = 256) -> DitConfig:
    """Return the config of the LiT of the same size: few-head linear attention, all else equal."""
    cfg = dit(size, patch, pixels)
    return replace(cfg, heads=LINEAR_HEADS[cfg.width], attention="linear")


PIXART_512 = "hf:PixArt-alpha/PixArt-Sigma-XL-2-512-MS/transformer"
PIXART_1024 = "hf:PixArt-alpha/PixArt-Sigma-XL-2-1024-MS/transformer"


def pixart_sigma(pixels: int = 512) -> PixArtConfig:
    """Return the config of PixArt-Sigma for pictures of 256, 512, 1024 or 2048 pixels."""
    size = pixels // 8
    return PixArtConfig(size=size, interpolation=published_interpolation(size))


def text_lit(pixels: int = 512) -> PixArtConfig:
    """Return the config of the text-to-image LiT: few-head linear self-attention, all else as in PixArt-Sigma."""
    cfg = pixart_sigma(pixels)
    return replace(cfg, heads=LINEAR_HEADS[cfg.width], attention="linear")


def icons_pixart() -> PixArtConfig:
    """Return the config of the small donor that draws the embedded icons, 64 pixels in latents of 16 x 16 x 4."""
    sizes: dict[str, Any] = dict(size=16, patch=4, interpolation=published_interpolation(16))
    sizes |= dict(width=192, layers=7, hidden=768)
    return PixArtConfig(heads=6, cross_heads=6, text_width=192, text_tokens=16, **sizes)


def icons_lit() -> PixArtConfig:
    """Return the config of its student: two heads of linear attention."""
    return replace(icons_pixart(), heads=2, attention="linear")


PUBLISHED = {DIT_XL_2_256: dit("xl"), DIT_XL_2_512: dit("xl", pixels=512)}


def outline(source: str) -> Donor | Outline:
    """Open a teacher for `heirloom compile`. Published ones are not downloaded, only their shapes are needed."""
    cfg = PUBLISHED.get(source)
    return Outline(FAMILY, cfg, functional(Dit, cfg)) if cfg else open_dit(source)


PUBLISHED_TEXT = {PIXART_512: pixart_sigma(512), PIXART_1024: pixart_sigma(1024)}


def text_outline(source: str) -> Donor | Outline:
    """Open a teacher as `outline` does, of text-to-image models."""
    cfg = PUBLISHED_TEXT.get(source)
    return Outline(PIXART, cfg, functional(PixArt, cfg)) if cfg else open_pixart(source)


def check_draws_classes(donor: Donor) -> None:
    """Raise InputError for an autoencoder, a text encoder, and a model that draws from text."""
    if isinstance(donor.cfg, PixArtConfig):
        raise InputError(f"{donor.path} draws from text, and this command draws classes: name a DiT or LiT of classes")
    if not isinstance(donor.cfg, DitConfig):
        what = "an autoencoder" if donor.family is AUTOENCODERS else "a text encoder"
        flag = "--autoencoder" if donor.family is AUTOENCODERS else "--text-encoder"
        raise InputError(f"{donor.path} is {what}, which draws no pictures: name a model, and pass this as {flag}")


def open_dit(source: str, **overrides: Any) -> Donor:
    """Open any DiT or LiT by SOURCE, lazily. Raises InputError if it does not exist or is another model."""
    return open_donor(locate(source, EMBEDDED), [FAMILY], **overrides)


def open_pixart(source: str, **overrides: Any) -> Donor:
    """Open any PixArt-Sigma or text-to-image LiT by SOURCE, lazily; of a pipeline folder, its transformer. Raises
    InputError if it does not exist or is another model.
    """
    path = locate(source, TEXT_EMBEDDED)
    return open_donor(main_part(path) if is_pipeline(path) else path, [PIXART], **overrides)

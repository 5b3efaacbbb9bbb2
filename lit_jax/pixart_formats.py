"""Reads and writes configs of other text-to-image transformers: PixArt-Σ's files, LiT's release, diffusers' folders."""

from fnmatch import fnmatchcase
from math import isqrt
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.convert import Donor, Format, Found, Guess, Lookalike, Read
from heirloom.common.checkpoint.weights import Tensors, write_json
from heirloom.common.errors import InputError, remark
from heirloom.common.nn.adaln import EPS
from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import agrees
from lit_jax import pixart_layouts
from lit_jax.components import pipeline_of, write_pipeline_of
from lit_jax.formats import linear_settings, sizes_of
from lit_jax.origin import copy_origin
from lit_jax.pixart import INTERPOLATION, PixArtConfig

SIDECAR = "pixart.json"
FILE = "diffusion_pytorch_model.safetensors"
SIGMA_TOKENS, ALPHA_TOKENS = 300, 120
_ALPHA = "a PixArt-α, whose embedders of size and aspect ratio PixArt-Σ lacks: only PixArt-Σ and LiT are read"
_COMPRESSED = (
    "a PixArt-Σ with compressed keys and values (kvcompress): only those without, such as 512-MS and 1024-MS, are read"
)
LOOKALIKES = (
    Lookalike("csize_embedder.*", _ALPHA),
    Lookalike("ar_embedder.*", _ALPHA),
    Lookalike("adaln_single.emb.resolution_embedder.*", _ALPHA),
    Lookalike("blocks.*.attn.sr.*", _COMPRESSED),
    Lookalike("transformer_blocks.*.attn1.norm_q.*", "a transformer with normalised queries, which PixArt-Σ lacks"),
    Lookalike("caption_norm.weight", "a Sana, another architecture: only DiT, LiT and PixArt-Σ are read"),
)
_MEANT = {"t_block.1.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.scale_shift_table"}


def _looks_alike(tensors: Tensors) -> bool:
    return any(fnmatchcase(key, other.keys) for key in tensors for other in LOOKALIKES)


def _read_pixart(found: Found) -> Read | None:
    tensors = found.tensors
    if not tensors.keys() >= _MEANT or _looks_alike(tensors):
        return None
    null = tensors.get("y_embedder.y_embedding")
    if null is not None and len(null) == ALPHA_TOKENS:
        raise InputError(f"its empty text has {ALPHA_TOKENS} tokens, so it is {_ALPHA}")
    sizes = sizes_of(tensors)
    known, guesses = _sidecar(found), list[Guess]()
    known |= _placed(tensors, sizes["patch"], sizes["width"])
    if "size" not in known:
        why = "its weights are those of any size; it is 32, 64, 128 or 256 for pictures of 256, 512, 1024, 2048 pixels"
        guesses.append(Guess("size", None, why))
    if "interpolation" not in known:
        known["interpolation"] = INTERPOLATION.get(known.get("size", 0), 1.0)
        guesses.append(
            Guess("interpolation", known["interpolation"], "the file does not say, and it follows from size")
        )
    attention: dict[str, Any] = dict(attention="softmax", heads=16)
    if "blocks.0.attn.qkv.weight" not in tensors:
        attention = linear_settings(tensors, sizes["width"])
        if "features" not in known:
            guesses.append(Guess("features", attention["features"], "the weights of a LiT with gelu look the same"))
    heads = known.pop("heads", None) or attention.pop("heads")
    if not heads:
        guesses.append(Guess("heads", None, "the shapes do not show the heads"))
    attention |= known | dict(heads=heads or 1, cross_heads=known.get("cross_heads", 16))
    cfg = PixArtConfig(
        **sizes | attention,
        text_width=tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        text_tokens=SIGMA_TOKENS if null is None else len(null),
        null_text=null is not None,
    )
    return Read(cfg, tuple(guesses))


def _placed(tensors: Tensors, patch: int, width: int) -> dict[str, Any]:
    """Finds size and interpolation from the table of positions; {} without one. Raises InputError for another table."""
    table = tensors.get("pos_embed")
    if table is None or table.size == 0:
        return {}
    side = isqrt(table.size // width)
    for interpolation in sorted({*INTERPOLATION.values()}):
        expected = sincos(side, side, width, interpolation).reshape(-1, width)
        if expected.size == table.size and agrees(table.reshape(-1, width), expected):
            return dict(size=side * patch, interpolation=interpolation)
    raise InputError(
        f"its position table, of {table.size // width} places, is none of PixArt-Σ's: other tables are not read"
    )


def _sidecar(found: Found) -> dict[str, Any]:
    fields = found.json(SIDECAR)
    if fields is None:
        return {}
    known: dict[str, Any] = {name: fields.integer(name) for name in ("size", "heads", "cross_heads")}
    known["interpolation"] = fields.number("interpolation", above=0)
    if "features" in fields:
        known["features"] = fields.choice("features", {n: n for n in ("relu", "gelu", "focused", "focused_gelu")})
    fields.done()
    return known


def _write_pixart(cfg: PixArtConfig, folder: Path) -> None:
    if not cfg.null_text:
        remark(
            f"{folder.name}: written without y_embedder.y_embedding, the features of the empty text, which the source"
            " lacks; PixArt's scripts set them when they load a model"
        )
    known = {name: getattr(cfg, name) for name in ("size", "heads", "cross_heads", "interpolation")}
    write_json(folder / SIDECAR, known | ({"features": cfg.features} if cfg.attention == "linear" else {}))


def _read_diffusers(found: Found) -> Read | None:
    tensors = found.tensors
    meant = {"adaln_single.linear.weight", "caption_projection.linear_1.weight", "pos_embed.proj.weight"}
    if not meant <= tensors.keys() or _looks_alike(tensors):
        return None
    fields = found.json("config.json")
    if fields is None:
        raise InputError("a diffusers transformer needs its config.json next to the weights; there is none")
    fields.fixed("_class_name", "PixArtTransformer2DModel", "Transformer2DModel")
    for name, value in _FIXED.items():
        fields.fixed(name, value)
    fields.fixed("use_additional_conditions", False, None, feature="PixArt-α")
    # Without effect: of other norms, of training, and of other kinds of inputs.
    fields.skip("_*", "dropout", "norm_num_groups", "upcast_attention", "num_embeds_ada_norm", "dtype", "torch_dtype")
    for name in ("num_vector_embeds", "double_self_attention", "only_cross_attention", "use_linear_projection"):
        fields.fixed(name, False, None)
    heads, channels = fields.integer("num_attention_heads", 16), fields.integer("in_channels", 4)
    width, size = heads * fields.integer("attention_head_dim", 72), fields.square("sample_size", 128)
    scale = fields.number("interpolation_scale", None, above=0)
    fields.agree("cross_attention_dim", fields.integer("cross_attention_dim", 1152), width)
    text = tensors["caption_projection.linear_1.weight"].shape[1]
    fields.agree("caption_channels", fields.integer("caption_channels", text) or text, text)
    written = fields.integer("out_channels", 8) or channels
    if written != 2 * channels:
        raise fields.refusal("out_channels", f"only models that predict noise and variance ({2 * channels}) are read")
    cfg = PixArtConfig(
        size=size,
        channels=channels,
        patch=fields.integer("patch_size", 2),
        width=width,
        layers=fields.integer("num_layers", 28),
        heads=heads,
        cross_heads=heads,
        hidden=len(tensors["transformer_blocks.0.ff.net.0.proj.bias"]),
        text_width=text,
        interpolation=float(max(size // 64, 1)) if scale is None else scale,
    )
    fields.done()
    return Read(cfg)


_FIXED: dict[str, Any] = dict(activation_fn="gelu-approximate", attention_bias=True, norm_type="ada_norm_single")
_FIXED |= dict(norm_elementwise_affine=False, norm_eps=EPS, attention_type="default")


def _write_diffusers(cfg: PixArtConfig, folder: Path) -> None:
    if cfg.attention != "softmax":
        raise InputError("diffusers has no linear attention for PixArt; keep the heirloom format, or write --to pixart")
    if cfg.heads != cfg.cross_heads or cfg.hidden != 4 * cfg.width:
        raise InputError(
            f"diffusers' PixArt has as many heads in both attentions and MLPs of four widths; this one has {cfg.heads}"
            f" and {cfg.cross_heads} heads, and {cfg.hidden} units at a width of {cfg.width}"
        )
    write_json(folder / "config.json", {"_class_name": "PixArtTransformer2DModel"} | diffusers_config(cfg))


def diffusers_config(cfg: PixArtConfig) -> dict[str, Any]:
    """Returns the arguments of diffusers' PixArtTransformer2DModel."""
    sizes = dict(sample_size=cfg.size, in_channels=cfg.channels, out_channels=2 * cfg.channels, patch_size=cfg.patch)
    sizes |= dict(num_layers=cfg.layers, num_attention_heads=cfg.heads, attention_head_dim=cfg.head_dim)
    sizes |= dict(cross_attention_dim=cfg.width, caption_channels=cfg.text_width, num_embeds_ada_norm=1000)
    rest = dict(use_additional_conditions=False, interpolation_scale=_whole(cfg.interpolation), dropout=0.0)
    return _FIXED | sizes | rest | dict(norm_num_groups=32, upcast_attention=False)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


FORMATS = (
    Format(
        name="pixart",
        layout=pixart_layouts.pixart,
        file="pixart.pth",
        read_config=_read_pixart,
        write_config=_write_pixart,
    ),
    Format(
        name="diffusers",
        layout=pixart_layouts.DIFFUSERS,
        file=FILE,
        read_config=_read_diffusers,
        write_config=_write_diffusers,
    ),
)


def sidecars(donor: Donor, destination: Path, format: str) -> None:
    """Copies which autoencoder and which pipeline the model belongs to; other formats have no place for the latter."""
    copy_origin(donor.folder, destination)
    if format == "heirloom":
        write_pipeline_of(destination, pipeline_of(donor))

"""Reads and writes configs of other PixArt-Sigmas: the released .pth files, where tensors give the config, and
diffusers' folders.
"""

from fnmatch import fnmatchcase
from fractions import Fraction
from math import atan2, isqrt
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from heirloom.common.checkpoint.family import Format, Found, Guess, Lookalike, Read
from heirloom.common.checkpoint.fields import AVERAGE, Fields
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError, remark
from heirloom.common.files import write_json
from heirloom.common.nn.adaln import EPS
from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import agrees
from lit_jax import pixart_layouts
from lit_jax.attention import Features
from lit_jax.formats import LOOKALIKES, linear_attention_of, predicts_noise, sizes_of
from lit_jax.pixart import PixArtConfig, published_interpolation
from lit_jax.trainer_arguments import OF_LATENTS, trained_as

SIDECAR = "pixart.json"
SIGMA_TOKENS, ALPHA_TOKENS = 300, 120  # of a prompt
PUBLISHED_HEADS = {1152: 16}
PUBLISHED_SIZES = (32, 64, 128, 256)
NULL_TEXT, CAPTION = "y_embedder.y_embedding", "y_embedder.y_proj.fc1.weight"
_ALPHA = "a PixArt-alpha with embedders of resolution and aspect ratio: only PixArt-Sigma, which has none, is read"
RELATIVES = (
    Lookalike("csize_embedder.*", _ALPHA),
    Lookalike("ar_embedder.*", _ALPHA),
    Lookalike("adaln_single.emb.resolution_embedder.*", _ALPHA),
    Lookalike("adaln_single.emb.aspect_ratio_embedder.*", _ALPHA),
    Lookalike(
        "*.attn.sr.*", "a PixArt-Sigma with compressed keys and values (kv_compress): only those without are read"
    ),
    Lookalike("*.attn.[qk]_norm.*", "a PixArt with normalised queries and keys (qk_norm): only those without are read"),
    Lookalike("controlnet.*", "a ControlNet of PixArt: only the PixArt-Sigma that it belongs to is read"),
    Lookalike("*.attn_temp.*", "an Open-Sora, which draws videos: only PixArt-Sigma and its LiT are read"),
)
"""Checkpoints that share PixArt-Sigma's names and have parts that it does not have."""


def _is_pixart(tensors: Tensors, key: str) -> bool:
    """Whether the tensors are a PixArt with this key. Raises InputError for a relative of PixArt-Sigma."""
    if key not in tensors or any(fnmatchcase(name, other.keys) for name in tensors for other in LOOKALIKES):
        return False
    for relative in RELATIVES:
        if any(fnmatchcase(name, relative.keys) for name in tensors):
            raise InputError(relative.advice)
    return True


def _read_released(found: Found) -> Read | None:
    tensors = found.tensors
    if not _is_pixart(tensors, "t_block.1.weight"):
        return None
    sizes = sizes_of(tensors)
    width, caption, null = sizes["width"], tensors.get(CAPTION), tensors.get(NULL_TEXT)
    if caption is None or caption.ndim != 2:
        raise InputError(f"looks like a PixArt, but its tensor {CAPTION!r} is missing or no matrix")
    sizes |= dict(text_width=caption.shape[1], null_text=null is not None)
    positions, sure = _positions(tensors, sizes["patch"], width), _sidecar(found)
    known, guesses = trained_as(found, sizes, sure | ({"size": positions.size} if positions else {}))
    rows = known.get("text_tokens") if null is None else null.shape[0] if null.ndim else 0
    sizes["text_tokens"], guess = _text_tokens(rows)
    guesses += guess
    if not (size := known.get("size", 0)):
        why = "without a position table the side of its latents is not known (PixArt-Sigma: 32, 64, 128 or 256)"
        guesses.append(Guess("size", None, why))
    interpolation = (positions.interpolation if positions else None) or known.get("interpolation")
    if interpolation is None:
        why = "the file does not contain it; published models have 0.5, 1, 2 and 4 for sizes 32, 64, 128 and 256"
        guesses.append(Guess("interpolation", published_interpolation(size) if size else "size / 64", why))
        interpolation = published_interpolation(size or 64)
    attention, guess = _attention(tensors, width, known)
    guesses += guess
    if known.get("prediction") != "noise":
        guesses.append(Guess("prediction", "noise", "the file does not say what it predicts; published models do this"))
    cfg = PixArtConfig(size=size or 64, interpolation=interpolation, **sizes, **attention)
    return Read(cfg, tuple(guesses), {name: known[name] for name in OF_LATENTS if name in known})


def _text_tokens(tokens: int | None, why: str = "the file does not contain it") -> tuple[int, list[Guess]]:
    """Returns the tokens of a prompt, with a guess if they are not known. Raises InputError for a PixArt-alpha."""
    if tokens == ALPHA_TOKENS:
        raise InputError(f"a PixArt-alpha, for prompts of {ALPHA_TOKENS} tokens: only PixArt-Sigma is read")
    if tokens is not None:
        return tokens, []
    why = f"{why}; PixArt-Sigma has {SIGMA_TOKENS}, a PixArt-alpha, which has {ALPHA_TOKENS}, may look the same"
    return SIGMA_TOKENS, [Guess("text_tokens", SIGMA_TOKENS, why)]


def _attention(tensors: Tensors, width: int, known: dict[str, Any]) -> tuple[dict[str, Any], list[Guess]]:
    """Returns the fields of self-attention and the heads of both attentions, with guesses."""
    guesses = []
    softmax = "blocks.0.attn.qkv.weight" in tensors
    found = dict(attention="softmax", heads=0) if softmax else linear_attention_of(tensors, width)
    heads = {"heads": known.get("heads") or found["heads"], "cross_heads": known.get("cross_heads") or 0}
    published = PUBLISHED_HEADS.get(width)
    for name in ("heads", "cross_heads"):
        if heads[name]:
            continue
        if softmax and name == "cross_heads":
            heads[name] = heads["heads"]  # PixArt has as many in both
        elif published and (softmax or name == "cross_heads"):
            heads[name] = published
            why = f"the shapes do not show them, and published PixArts {width} wide have as many"
            guesses.append(Guess(name, published, why))
        else:
            why = f"the shapes do not show the {name}, and no published model of this kind is {width} wide"
            guesses.append(Guess(name, None, why))
    if not softmax and "features" not in known:
        other = "focused_gelu" if found["features"] == "focused" else "gelu"
        guesses.append(Guess("features", found["features"], f"the weights of a LiT with {other} look the same"))
    features = {} if softmax else {"features": known.get("features", found["features"])}
    return found | heads | features, guesses


class Positions(NamedTuple):
    """What a position table shows: the side of the latents, and the interpolation unless the table is one cell."""

    size: int
    interpolation: float | None


def _positions(tensors: Tensors, patch: int, width: int) -> Positions | None:
    """Reads the position table; None without one. Raises InputError for a table that is not PixArt's."""
    table = tensors.get("pos_embed")
    if table is None:
        return None
    count = table.size // width
    side = isqrt(count)
    if side**2 == count and table.size == count * width:
        flat = np.asarray(table, np.float64).reshape(-1, width)
        step = atan2(flat[1, 0], flat[1, width // 4]) if side > 1 else 1.0  # position of the second column
        near = [float(Fraction(1 / step).limit_denominator(100))] if step > 1e-3 else []
        for interpolation in (*map(published_interpolation, PUBLISHED_SIZES), *near):
            ours = sincos(side, side, width, side / interpolation).reshape(-1, width) if interpolation else None
            if ours is not None and agrees(table.reshape(-1, width), ours):
                return Positions(side * patch, interpolation if side > 1 else None)
    raise InputError(
        f"its position table, of {count} places, is not PixArt's fixed table of a square: learned and other tables are"
        " not read"
    )


def _sidecar(found: Found) -> dict[str, Any]:
    """Reads the settings that tensors do not show from the sidecar file that we write."""
    fields = found.json(SIDECAR)
    if fields is None:
        return {}
    known: dict[str, Any] = {name: fields.integer(name, None) for name in _WRITTEN}
    known["interpolation"] = fields.number("interpolation", None, above=0.0)
    known["prediction"] = fields.choice("prediction", {"noise": "noise"}, "noise") if "prediction" in fields else None
    every = {name: name for name in get_args(Features)}
    known["features"] = fields.choice("features", every) if "features" in fields else None
    fields.done()
    return {name: value for name, value in known.items() if value is not None}


_WRITTEN = ("heads", "cross_heads", "size", "text_tokens")


def _write_released(cfg: PixArtConfig, folder: Path) -> None:
    if cfg.attention == "softmax" and cfg.heads != cfg.cross_heads:
        raise InputError(
            f"PixArt has as many heads in both attentions, this model has {cfg.heads} and {cfg.cross_heads}; keep the"
            " heirloom format"
        )
    known: dict[str, Any] = {name: getattr(cfg, name) for name in _WRITTEN}
    known |= {"interpolation": cfg.interpolation, "prediction": "noise"}
    write_json(folder / SIDECAR, known | ({"features": cfg.features} if cfg.attention == "linear" else {}))
    if not cfg.null_text:
        remark(
            f"{NULL_TEXT!r}, the text encoder's features of the empty prompt, is not written, because this model does"
            " not contain it"
        )


def _read_diffusers(found: Found) -> Read | None:
    tensors = found.tensors
    if not _is_pixart(tensors, "adaln_single.linear.weight"):
        return None
    fields = found.json("config.json")
    if fields is None:
        raise InputError("a diffusers transformer needs its config.json next to the weights; there is none")
    fields.fixed("_class_name", "PixArtTransformer2DModel", "Transformer2DModel")
    fields.fixed("norm_type", "ada_norm_single")
    fields.fixed("activation_fn", "gelu-approximate")
    fields.fixed("attention_bias", True)
    fields.fixed("attention_type", "default")
    fields.fixed("norm_elementwise_affine", False)
    fields.fixed("norm_eps", EPS)
    # Fields of diffusers' older general transformer class for parts that a PixArt does not have.
    fields.fixed("num_vector_embeds", None)
    for name in ("only_cross_attention", "use_linear_projection", "double_self_attention"):
        fields.fixed(name, False)
    fields.skip("_*", "dropout", "norm_num_groups", "num_embeds_ada_norm", "upcast_attention", "dtype", "torch_dtype")
    fields.skip(*AVERAGE)
    channels, heads = fields.integer("in_channels", 4), fields.integer("num_attention_heads", 16)
    width, size = heads * fields.integer("attention_head_dim", 72), fields.square("sample_size", 128)
    _no_conditions(fields, size)
    written = fields.integer("out_channels", 8) or channels
    if written != 2 * channels:
        why = f"only models that predict noise and variance ({2 * channels}) are read"
        raise fields.refusal("out_channels", why)
    if fields.integer("cross_attention_dim", 1152) != width:
        raise fields.refusal("cross_attention_dim", f"only models where it is the width ({width}) are read")
    caption = fields.integer("caption_channels", None)
    if caption is None:
        raise fields.refusal("caption_channels", "only models that project the text features are read")
    # diffusers' own default where the field is null
    interpolation = fields.number("interpolation_scale", None, above=0.0) or float(max(size // 64, 1))
    hidden = tensors.get("transformer_blocks.0.ff.net.0.proj.bias")
    tokens, guesses = _text_tokens(_pipeline_tokens(found), "no model_index.json above the folder names the pipeline")
    cfg = PixArtConfig(
        size=size,
        channels=channels,
        patch=fields.integer("patch_size", 2),
        width=width,
        layers=fields.integer("num_layers", 28),
        heads=heads,
        cross_heads=heads,
        hidden=4 * width if hidden is None else len(hidden),
        text_width=caption,
        text_tokens=tokens,
        interpolation=interpolation,
    )
    fields.done()
    return Read(cfg, (*guesses, *predicts_noise(found)))


def _no_conditions(fields: Fields, size: int) -> None:
    """Refuses the embedders of resolution and aspect ratio. Where the field is null, diffusers makes them at size
    128.
    """
    if fields.boolean("use_additional_conditions", None) or (
        fields.value("use_additional_conditions") is None and size == 128
    ):
        raise fields.refusal("use_additional_conditions", f"{_ALPHA} (false)")


def _pipeline_tokens(found: Found) -> int | None:
    """Returns the tokens of a prompt of the pipeline that the folder is part of; None where there is none."""
    pipeline = found.json("../model_index.json")
    name = pipeline.text("_class_name", "") if pipeline else ""
    return SIGMA_TOKENS if "Sigma" in name else ALPHA_TOKENS if "PixArtAlpha" in name else None


def _write_diffusers(cfg: PixArtConfig, folder: Path) -> None:
    if cfg.attention != "softmax":
        raise InputError("diffusers has no linear attention for PixArt; keep the heirloom format, or write --to pixart")
    if cfg.hidden != 4 * cfg.width:
        raise InputError(
            f"diffusers' PixArt has MLPs of four widths, this model has {cfg.hidden} units at a width of {cfg.width}"
        )
    if cfg.heads != cfg.cross_heads:
        raise InputError(
            f"diffusers' PixArt has as many heads in both attentions, this model has {cfg.heads} and {cfg.cross_heads}"
        )
    sizes = dict(
        num_attention_heads=cfg.heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.channels,
        out_channels=2 * cfg.channels,
        num_layers=cfg.layers,
        cross_attention_dim=cfg.width,
        sample_size=cfg.size,
        patch_size=cfg.patch,
        interpolation_scale=int(cfg.interpolation) if cfg.interpolation.is_integer() else cfg.interpolation,
        caption_channels=cfg.text_width,
    )
    fixed = dict(
        dropout=0.0,
        norm_num_groups=32,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        upcast_attention=False,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=EPS,
        use_additional_conditions=False,
        attention_type="default",
    )
    write_json(folder / "config.json", {"_class_name": "PixArtTransformer2DModel"} | sizes | fixed)


FORMATS = (
    Format(
        name="pixart",
        layout=pixart_layouts.released,
        file="pixart.pth",
        read_config=_read_released,
        write_config=_write_released,
    ),
    Format(
        name="diffusers",
        layout=pixart_layouts.DIFFUSERS,
        file="diffusion_pytorch_model.safetensors",
        read_config=_read_diffusers,
        write_config=_write_diffusers,
    ),
)

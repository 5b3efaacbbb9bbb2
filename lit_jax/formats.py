"""Reads and writes configs of other DiTs: facebookresearch's files, where tensor shapes give the config, and diffusers'
folders.
"""

import re
from fnmatch import fnmatchcase
from math import isqrt
from pathlib import Path
from typing import Any, get_args

from heirloom.common.checkpoint.family import Donor, Format, Found, Guess, Lookalike, Read
from heirloom.common.checkpoint.fields import AVERAGE
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError
from heirloom.common.files import write_json
from heirloom.common.nn.adaln import EPS
from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import agrees
from lit_jax import layouts
from lit_jax.attention import Features
from lit_jax.components import check_chain, class_names, copy_parts, write_names
from lit_jax.dit import SOFTMAX_HEADS, DitConfig
from lit_jax.origin import copy_origin
from lit_jax.trainer_arguments import OF_LATENTS, trained_as

SIDECAR = "dit.json"
NORM_EPS = 1e-5  # of diffusers' norm before the MLP
# Class counts of common data sets: a label table with exactly as many rows may have no row for "no class".
_COMMON_CLASS_COUNTS = (10, 100, 200, 365, 1000, 21_841, 21_843)
# Fields of diffusers' older general transformer class for parts that a DiT does not have.
_UNUSED: dict[str, Any] = dict(
    num_vector_embeds=None,
    cross_attention_dim=None,
    only_cross_attention=False,
    use_linear_projection=False,
    attention_type="default",
) | dict(caption_channels=None, interpolation_scale=None, use_additional_conditions=None, double_self_attention=False)
_SANA = "a Sana: of the models that draw from text only PixArt-Sigma and its LiT are read"

LOOKALIKES = (
    Lookalike(
        "projectors.*", "a SiT trained with REPA, which predicts velocity: only DiTs, which predict noise, are read"
    ),
    Lookalike("*.experts.*", "a DiT-MoE, whose MLPs are mixtures of experts: only DiTs with plain MLPs are read"),
    Lookalike("en_inblocks.*", "a masked diffusion transformer (MDT): only DiTs are read"),
    Lookalike("in_blocks.*.attn.*", "a U-ViT: only DiTs are read"),
    Lookalike(
        "blocks.*.mlp.w12.*",
        "a LightningDiT (SwiGLU, rotary positions, velocity): only DiTs of facebookresearch's kind are read",
    ),
    Lookalike("temp_embed", "a Latte, which draws videos: only DiTs are read"),
    Lookalike("temporal_transformer_blocks.*", "a Latte, which draws videos: only DiTs are read"),
    Lookalike("caption_norm.weight", _SANA),
    Lookalike("attention_y_norm.weight", _SANA),
    Lookalike("*joint_blocks.*", "a Stable Diffusion 3: only DiT, PixArt-Sigma and their LiTs are read"),
    Lookalike("*double_blocks.*", "a FLUX: only DiT, PixArt-Σ and their LiTs are read"),
    Lookalike("*diffusion_model.input_blocks.*", "a U-Net: only DiT, PixArt-Sigma and their LiTs are read"),
    Lookalike("down_blocks.*.attentions.*", "a U-Net: only DiT, PixArt-Sigma and their LiTs are read"),
)


def _read_fair(found: Found) -> Read | None:
    tensors = found.tensors
    if (
        not {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"}
        <= tensors.keys()
    ):
        return None
    if any(fnmatchcase(key, other.keys) for key in tensors for other in LOOKALIKES):
        return None
    sizes = sizes_of(tensors)
    width, rows = sizes["width"], len(tensors["y_embedder.embedding_table.weight"])
    size = _size(tensors, sizes["patch"], width)
    known, guesses = trained_as(found, sizes, _sidecar(found) | ({"size": size} if size else {}))
    sizes["size"] = known.get("size", 0)
    if not sizes["size"] and known.get("pixels", 0) >= 8 and sizes["channels"] != 3:
        sizes["size"] = known["pixels"] // 8
        why = f"it was trained on pictures of {known['pixels']} pixels, and autoencoders of DiTs shrink eight times"
        guesses.append(Guess("size", sizes["size"], why))
    elif not sizes["size"]:
        why = "without a position table the side of its inputs is not known (latent cells, or pixels)"
        guesses.append(Guess("size", None, why))
        sizes["size"] = sizes["patch"]  # until it is set
    classes, guess = _classes(rows, known.get("classes"))
    guesses += guess
    softmax = "blocks.0.attn.qkv.weight" in tensors
    attention = dict(attention="softmax", heads=0) if softmax else linear_attention_of(tensors, width)
    if "heads" in known:
        attention["heads"] = known["heads"]
    elif attention["attention"] == "softmax" and width in SOFTMAX_HEADS:
        attention["heads"] = SOFTMAX_HEADS[width]
        guesses.append(
            Guess(
                "heads",
                attention["heads"],
                f"the shapes do not show them, and published DiTs {width} wide have as many",
            )
        )
    if not attention["heads"]:
        guesses.append(
            Guess(
                "heads", None, f"the shapes do not show the heads, and no published model of this kind is {width} wide"
            )
        )
    if attention["attention"] == "linear":
        if "features" in known:
            attention["features"] = known["features"]
        else:
            other = "focused_gelu" if attention["features"] == "focused" else "gelu"
            guesses.append(Guess("features", attention["features"], f"the weights of a LiT with {other} look the same"))
    if known.get("prediction") != "noise":
        guesses.append(
            Guess(
                "prediction", "noise", "a SiT, which predicts velocity, has the same tensors, and the file does not say"
            )
        )
    cfg = DitConfig(**sizes, classes=classes, null_class=classes < rows, **attention)
    return Read(cfg, tuple(guesses), {name: known[name] for name in OF_LATENTS if name in known})


def sizes_of(tensors: Tensors) -> dict[str, Any]:
    """Read the sizes of any DiT or PixArt from its tensor shapes. Raises InputError for an unsupported architecture."""
    try:
        width, channels, patch, patch_col = tensors["x_embedder.proj.weight"].shape
        layers = 1 + max(int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key)))
        hidden, written = len(tensors["blocks.0.mlp.fc1.weight"]), len(tensors["final_layer.linear.weight"])
    except (KeyError, ValueError) as error:
        raise InputError(f"looks like a DiT or PixArt, but its tensors do not tell the sizes ({error})") from error
    if patch != patch_col:
        raise InputError(f"its patches are {patch} x {patch_col}: only square patches are read")
    if width % 4 or not width:
        raise InputError(f"its width is {width}: the position table needs a multiple of 4")
    if written != 2 * channels * patch**2:
        if written == channels * patch**2:
            raise InputError(
                "it predicts no variance (learn_sigma=False): only models that predict noise and variance are read"
            )
        raise InputError(
            f"its last layer writes {written} numbers a patch: with {channels} channels it should be"
            f" {2 * channels * patch**2}"
        )
    return dict(channels=channels, patch=patch, width=width, layers=layers, hidden=hidden)


def _size(tensors: Tensors, patch: int, width: int) -> int:
    """Find the side of the input from the position table; 0 without one. Raises InputError for rectangles."""
    table = tensors.get("pos_embed")
    if table is None:
        return 0
    count = table.size // width

    def grid(rows: int, cols: int) -> bool:
        whole = rows * cols * width == table.size
        return whole and agrees(table.reshape(-1, width), sincos(rows, cols, width).reshape(-1, width))

    if grid(isqrt(count), isqrt(count)):
        return isqrt(count) * patch
    for rows in range(1, count + 1):
        if grid(rows, cols := count // rows):
            raise InputError(
                f"its inputs are rectangles of {rows * patch} x {cols * patch}: only DiTs for squares are read"
            )
    raise InputError(
        f"its position table, of {count} places, is not DiT's fixed table of a square: learned and other tables are not"
        " read"
    )


def _classes(rows: int, known: int | None) -> tuple[int, list[Guess]]:
    """Find the number of classes of a label table: `rows`, or one less if the last row means "no class". Returns it
    with guesses.
    """
    if known is not None:
        if known not in (rows, rows - 1):
            raise InputError(
                f"its arguments say {known} classes, and the table of classes has {rows} rows; is it another model's?"
            )
        return known, []
    if rows == 1:
        return 1, []
    if rows in _COMMON_CLASS_COUNTS:
        why = (
            f"the table of classes has {rows} rows, which may be {rows} classes and none for no class, or {rows - 1}"
            " and one for it"
        )
        return rows - 1, [Guess("classes", None, why)]
    return rows - 1, [Guess("classes", rows - 1, f"the table has {rows} rows, and the last is taken for no class")]


def linear_attention_of(tensors: Tensors, width: int) -> dict[str, Any]:
    """Read LiT's attention settings; the number of heads follows from a shared bank of filters."""
    features = "focused" if "blocks.0.attn.scale" in tensors else "relu"
    bank = tensors.get("blocks.0.attn.dwc.weight")
    if bank is None or not len(bank):
        return dict(attention="linear", heads=0, filters="none", features=features)
    shared = len(bank) < width
    filters: dict[str, Any] = dict(filters="shared" if shared else "channel", window=bank.shape[-1])
    return dict(attention="linear", heads=width // len(bank) if shared else 0, features=features) | filters


def _sidecar(found: Found) -> dict[str, Any]:
    """Read the settings that shapes do not show from the sidecar file that we write."""
    fields = found.json(SIDECAR)
    if fields is None:
        return {}
    known = dict(
        heads=fields.integer("heads", None),
        classes=fields.integer("classes", None),
        prediction=fields.text("prediction", None),
    )
    known["features"] = (
        fields.choice("features", {name: name for name in get_args(Features)}, "relu") if "features" in fields else None
    )
    fields.done()
    return {name: value for name, value in known.items() if value is not None}


def _write_fair(cfg: DitConfig, folder: Path) -> None:
    known = {"heads": cfg.heads, "classes": cfg.classes, "prediction": "noise"}
    write_json(folder / SIDECAR, known | ({"features": cfg.features} if cfg.attention == "linear" else {}))


def _read_diffusers(found: Found) -> Read | None:
    tensors = found.tensors
    if "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight" not in tensors:
        return None
    fields = found.json("config.json")
    if fields is None:
        raise InputError("a diffusers transformer needs its config.json next to the weights; there is none")
    fields.fixed("_class_name", "DiTTransformer2DModel", "Transformer2DModel")
    fields.fixed("activation_fn", "gelu-approximate")
    fields.fixed("attention_bias", True)
    fields.fixed("norm_type", "ada_norm_zero")
    fields.fixed("norm_elementwise_affine", False)
    fields.fixed(
        "norm_eps", NORM_EPS, EPS
    )  # diffusers uses it in one of two norms; `verify` compares with it changed there
    for name, value in _UNUSED.items():
        fields.fixed(name, value, None)
    fields.skip("_*", "dropout", "norm_num_groups", "upcast_attention", "dtype", "torch_dtype", *AVERAGE)
    channels, heads = fields.integer("in_channels", 4), fields.integer("num_attention_heads", 16)
    written = fields.integer("out_channels", None) or channels
    cfg = DitConfig(
        size=fields.square("sample_size", 32),
        channels=channels,
        patch=fields.integer("patch_size", 2),
        width=heads * fields.integer("attention_head_dim", 72),
        layers=fields.integer("num_layers", 28),
        heads=heads,
        hidden=len(tensors["transformer_blocks.0.ff.net.0.proj.bias"]),
        classes=fields.integer("num_embeds_ada_norm", 1000),
    )
    fields.done()
    if written != 2 * channels:
        raise InputError(
            f"{fields.where}: out_channels is {written}; only DiTs that predict noise and variance ({2 * channels}) are"
            " read"
        )
    return Read(cfg, predicts_noise(found))


# diffusers' schedulers that sample a chain of noise in other ways.
SAMPLERS: tuple[str, ...] = ("DDPM", "DDIM", "PNDM", "LMSDiscrete", "DPMSolver", "Euler", "Heun", "UniPC", "DEIS")
SAMPLERS += ("KDPM2", "SA", "CogVideoXDDIM")


def predicts_noise(found: Found) -> tuple[Guess, ...]:
    """Check that the pipeline's scheduler config says that the model predicts noise; returns a guess if there is
    none.
    """
    for fields in filter(None, map(found.json, ("scheduler_config.json", "../scheduler/scheduler_config.json"))):
        kind = fields.text("_class_name", "")
        if kind and not kind.removesuffix("Scheduler").startswith(SAMPLERS):
            raise InputError(
                f"{fields.where}: {kind} samples models of another kind; only models that predict noise are read"
            )
        check_chain(fields)
        return ()
    return (
        Guess("prediction", "noise", "no scheduler_config.json next to the transformer says it; published models do"),
    )


def _write_diffusers(cfg: DitConfig, folder: Path) -> None:
    if cfg.attention != "softmax":
        raise InputError("diffusers has no linear attention for DiT; keep the heirloom format, or write --to fair")
    if not cfg.null_class:
        raise InputError(
            "diffusers' DiT has a row for no class, this model has none; keep the heirloom format, or write --to fair"
        )
    if cfg.hidden != 4 * cfg.width:
        raise InputError(
            f"diffusers' DiT has MLPs of four widths, this model has {cfg.hidden} units at a width of {cfg.width}"
        )
    fixed: dict[str, Any] = dict(
        activation_fn="gelu-approximate", attention_bias=True, norm_type="ada_norm_zero", norm_eps=NORM_EPS
    )
    fixed |= dict(norm_elementwise_affine=False, dropout=0.0, norm_num_groups=32, upcast_attention=False)
    sizes = dict(sample_size=cfg.size, in_channels=cfg.channels, out_channels=2 * cfg.channels, patch_size=cfg.patch)
    sizes |= dict(
        num_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        attention_head_dim=cfg.head_dim,
        num_embeds_ada_norm=cfg.classes,
    )
    write_json(folder / "config.json", {"_class_name": "DiTTransformer2DModel"} | fixed | sizes)


FORMATS = (
    # Without a wrapper, because DiT's own script reads it so.
    Format(
        name="fair", layout=layouts.fair, file="dit.pt", read_config=_read_fair, write_config=_write_fair, wrapper=None
    ),
    Format(
        name="diffusers",
        layout=layouts.DIFFUSERS,
        file="diffusion_pytorch_model.safetensors",
        read_config=_read_diffusers,
        write_config=_write_diffusers,
    ),
)


def sidecars(donor: Donor, destination: Path, format: str) -> None:
    """Write the model's class names, which autoencoder made its latents, and what it is drawn with."""
    copy_origin(donor.folder, destination)
    if isinstance(donor.cfg, DitConfig):
        write_names(destination, class_names(donor))
    if format == "heirloom":  # other formats have no place for it
        copy_parts(donor, destination)

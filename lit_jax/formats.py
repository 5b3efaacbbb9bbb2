"""Configurations of other DiTs, both ways: facebookresearch's files, whose shapes tell it, and diffusers' folders."""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from common.checkpoint.convert import Donor, Format, Found, Read
from common.checkpoint.weights import Tensors, read_json, write_json
from common.errors import InputError
from common.typed import from_json
from lit_jax import layouts
from lit_jax.dit import SOFTMAX_HEADS, DitConfig

_DIFFUSERS: dict[str, Any] = dict(
    activation_fn="gelu-approximate", attention_bias=True, norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-5
) | dict(dropout=0.0, norm_num_groups=32, upcast_attention=False)
SIDECAR = "dit.json"


def config(saved: Mapping[str, Any]) -> DitConfig:
    """The config of a weights folder of ours."""
    return from_json(DitConfig, saved)


def _read_fair(tensors: Tensors, folder: Path) -> DitConfig | None:
    if not {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"} <= tensors.keys():
        return None
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        layers = 1 + max(int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key)))
        hidden = len(tensors["blocks.0.mlp.fc1.weight"])
        classes = len(tensors["y_embedder.embedding_table.weight"]) - 1
        grid = isqrt(tensors["pos_embed"].shape[1])
    except (KeyError, ValueError) as error:
        raise InputError(f"looks like a DiT, but its tensors do not tell the sizes ({error})") from error
    sizes: dict[str, Any] = dict(size=grid * patch, channels=channels, patch=patch, width=width, layers=layers, hidden=hidden)
    sizes |= dict(classes=classes)
    # What shapes cannot tell stands in a file that we write beside the weights; published widths have published heads.
    known = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}
    if "blocks.0.attn.qkv.weight" in tensors:
        return DitConfig(**sizes, **{"heads": SOFTMAX_HEADS.get(width, 0)} | known)
    bank = tensors.get("blocks.0.attn.dwc.weight")
    linear: dict[str, Any] = dict(attention="linear", heads=0, filters="none")
    linear |= dict(features="focused" if "blocks.0.attn.scale" in tensors else "relu")
    if bank is not None:
        shared = len(bank) < width
        linear |= dict(filters="shared" if shared else "channel", window=bank.shape[2], heads=width // len(bank) if shared else 0)
    return DitConfig(**sizes, **linear | known)


def _write_fair(cfg: DitConfig, folder: Path) -> None:
    write_json(folder / SIDECAR, {"heads": cfg.heads} | ({"features": cfg.features} if cfg.attention == "linear" else {}))


def _read_diffusers(tensors: Tensors, folder: Path) -> DitConfig | None:
    if "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight" not in tensors:
        return None
    if not (folder / "config.json").is_file():
        raise InputError("a diffusers transformer needs its config.json beside the weights; there is none")
    theirs = _DIFFUSERS | dict(sample_size=32, in_channels=4, patch_size=2, num_layers=28, num_attention_heads=16)
    theirs |= dict(attention_head_dim=72, num_embeds_ada_norm=1000) | read_json(folder / "config.json")
    for name in ("activation_fn", "attention_bias", "norm_type", "norm_elementwise_affine"):
        if theirs[name] != _DIFFUSERS[name]:
            raise InputError(f"config.json: {name} is {theirs[name]!r}, a DiT has {_DIFFUSERS[name]!r}")
    if theirs.get("out_channels") not in (None, 2 * theirs["in_channels"]):
        raise InputError(f"config.json: out_channels {theirs['out_channels']} leave no room for the variance; only such DiTs are read")
    width = theirs["num_attention_heads"] * theirs["attention_head_dim"]
    return DitConfig(
        size=theirs["sample_size"],
        channels=theirs["in_channels"],
        patch=theirs["patch_size"],
        width=width,
        layers=theirs["num_layers"],
        heads=theirs["num_attention_heads"],
        hidden=len(tensors["transformer_blocks.0.ff.net.0.proj.bias"]),
        classes=theirs["num_embeds_ada_norm"],
    )


def _write_diffusers(cfg: DitConfig, folder: Path) -> None:
    if cfg.attention != "softmax":
        raise InputError("diffusers has no linear attention for DiT; keep the heirloom format, or write --to fair")
    if cfg.hidden != 4 * cfg.width:
        raise InputError(f"diffusers' DiT has MLPs of four widths, this model has {cfg.hidden} units at a width of {cfg.width}")
    sizes = dict(sample_size=cfg.size, in_channels=cfg.channels, out_channels=2 * cfg.channels, patch_size=cfg.patch)
    sizes |= dict(num_layers=cfg.layers, num_attention_heads=cfg.heads, attention_head_dim=cfg.head_dim, num_embeds_ada_norm=cfg.classes)
    write_json(folder / "config.json", {"_class_name": "DiTTransformer2DModel"} | _DIFFUSERS | sizes)


def _plain(read: Any) -> Any:
    def config(found: Found) -> Read | None:
        cfg = read(found.tensors, found.folder)
        return cfg and Read(cfg)

    return config


FORMATS = (
    Format("fair", layouts.fair, "dit.pt", _plain(_read_fair), _write_fair, clean=lambda key: key.removeprefix("module.")),
    Format("diffusers", layouts.DIFFUSERS, "diffusion_pytorch_model.safetensors", _plain(_read_diffusers), _write_diffusers),
)


def companions(donor: Donor, destination: Path, format: str) -> None:
    """Nothing travels with a DiT but its config."""

"""Reads, writes and verifies diffusers' AutoencoderKL, of torch and of Flax."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.family import Donor, Family, Format, Found, Lookalike, Read
from heirloom.common.checkpoint.fields import AVERAGE
from heirloom.common.checkpoint.flax_files import as_torch
from heirloom.common.checkpoint.verify import RENAMED, Check, against, as_folder, compare, outputs
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.layout import Layout
from heirloom.common.surgery.rows import Rows, module, modules
from heirloom.common.typed import from_json
from lit_jax.autoencoder import Autoencoder, AutoencoderConfig, macs, parameters

FILE = "diffusion_pytorch_model.safetensors"
OTHERS = (
    "the autoencoder of Stable Diffusion 3, FLUX or a later model is not read; DiT and LiT use"
    " stabilityai/sd-vae-ft-ema"
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _conv(ours: str, theirs: str) -> Rows:
    return ((f"{ours}/kernel", f"{theirs}.weight", "out in row col"), (f"{ours}/bias", f"{theirs}.bias"))


def _resnet(ours: str, theirs: str) -> Rows:
    convs = dict(conv1="conv1", conv2="conv2", shortcut="conv_shortcut")
    norms = modules(ours, theirs, {"norm1": "norm1", "norm2": "norm2"})
    return (*norms, *(row for a, b in convs.items() for row in _conv(f"{ours}/{a}", f"{theirs}.{b}")))


def _half(half: str, levels: str, resize: str) -> Rows:
    """Rows of the encoder or the decoder. levels: name of the list of levels; resize: name of the layer that resamples
    between levels.
    """
    attention, middle = f"{half}.mid_block.attentions.0", f"{half}.mid_block.resnets"
    projections = dict(query="to_q", key="to_k", value="to_v", out="to_out.0")
    return (
        *_conv(f"{half}/input", f"{half}.conv_in"),
        *_resnet(f"{half}/{levels}/*/resnets/*", f"{half}.{levels}_blocks.*.resnets.*"),
        *_conv(f"{half}/{levels}/*/resize", f"{half}.{levels}_blocks.*.{resize}.0.conv"),
        *_resnet(f"{half}/middle/before", f"{middle}.0"),
        *module(f"{half}/middle/attn_norm", f"{attention}.group_norm"),
        *modules(f"{half}/middle/attn", attention, projections),
        *_resnet(f"{half}/middle/after", f"{middle}.1"),
        *module(f"{half}/norm", f"{half}.conv_norm_out"),
        *_conv(f"{half}/output", f"{half}.conv_out"),
    )


ROWS = (
    *_half("encoder", "down", "downsamplers"),
    *_conv("quant", "quant_conv"),
    *_conv("post_quant", "post_quant_conv"),
    *_half("decoder", "up", "upsamplers"),
)
DIFFUSERS = Layout(name="diffusers", rows=ROWS)


def _flax(rows: Rows) -> Rows:
    """The rows above in the names of diffusers' Flax model: kernels read first, and attention has its older names."""
    linear = {name: "embed (head head_dim)" for name in ("query", "key", "value")} | {"out": "(head head_dim) embed"}
    older = {new: old for old, new in _OLD_ATTENTION.items()}

    def row(path: str, key: str) -> tuple[str, ...]:
        *modules, layer, leaf = path.split("/")
        name = re.sub(r"\.(\d+|\*)(?=\.)", r"_\1", re.sub(r"to_out\.0|to_\w", lambda new: older[new[0]], key))
        foreign = f"{name.rpartition('.')[0].replace('.', '/')}/{leaf}"
        if leaf != "kernel":
            return path, foreign
        return path, foreign, linear[layer] if modules[-1:] == ["attn"] else "row col in out"

    return tuple(row(path, key) for path, key, *_ in rows)


FLAX = Layout(name="flax", rows=_flax(ROWS))


def clean(key: str) -> str:
    """Return the current name of a tensor: older files (such as sd-vae-ft-*) name the attention layers differently."""
    return re.sub(r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda old: _OLD_ATTENTION[old[0]], key)


def _read(found: Found) -> Read | None:
    fields = found.json("config.json")
    if fields is not None and re.search("Autoencoder|VAE|^VQ", str(fields.value("_class_name"))):
        fields.fixed("_class_name", "AutoencoderKL", "FlaxAutoencoderKL")  # before the tensors, which may be like these
    if (
        not {"encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"}
        <= found.tensors.keys()
    ):
        return None
    if fields is None:
        raise InputError("an AutoencoderKL of diffusers needs its config.json next to the weights; there is none")
    fields.fixed("_class_name", "AutoencoderKL", "FlaxAutoencoderKL")
    for name, usual in (
        ("shift_factor", None),
        ("latents_mean", None),
        ("latents_std", None),
        ("use_quant_conv", True),
    ):
        if (value := fields.value(name, usual)) != usual and not (name == "shift_factor" and value == 0):
            raise InputError(f"{fields.where}: {name} is {value!r}, and must be {usual}: {OTHERS}")
    fields.fixed("use_post_quant_conv", True)
    fields.fixed("mid_block_add_attention", True)
    fields.fixed("act_fn", "silu", "swish")  # two names of one function
    fields.fixed("in_channels", 3)
    fields.fixed("out_channels", 3)
    fields.skip("force_upcast", "dtype", "torch_dtype", "_*", *AVERAGE)  # computed in float32 always
    channels = fields.integers("block_out_channels", (64,))
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        fields.fixed(name, [kind] * len(channels))
    cfg = AutoencoderConfig(
        channels=channels,
        resnets=fields.integer("layers_per_block", 1),
        latent=fields.integer("latent_channels", 4),
        groups=fields.integer("norm_num_groups", 32),
        scaling_factor=fields.number("scaling_factor", 0.18215, least=1e-6),
        size=fields.square("sample_size", 32),
    )
    fields.done()
    return Read(cfg)


def _read_flax(found: Found) -> Read | None:
    if "encoder/down_blocks_0/resnets_0/norm1/scale" not in found.tensors:
        return None
    return _read(replace(found, tensors=as_torch(found.tensors)))


def _write_flax(cfg: AutoencoderConfig, folder: Path) -> None:
    _write(cfg, folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | dict(_class_name="FlaxAutoencoderKL"))


def _write(cfg: AutoencoderConfig, folder: Path) -> None:
    levels = len(cfg.channels)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    sizes = dict(block_out_channels=list(cfg.channels), layers_per_block=cfg.resnets, latent_channels=cfg.latent)
    rest = dict(norm_num_groups=cfg.groups, scaling_factor=cfg.scaling_factor, sample_size=cfg.size, act_fn="silu")
    fixed: dict[str, Any] = dict(
        in_channels=3, out_channels=3, use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True
    )
    fixed |= dict(shift_factor=None, latents_mean=None, latents_std=None)
    write_json(folder / "config.json", dict(_class_name="AutoencoderKL") | fixed | blocks | sizes | rest)


def inputs(cfg: AutoencoderConfig) -> np.ndarray:
    """Make two seeded pictures of 5 by 7 latent positions, f32 in [-1, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 5 * cfg.factor, 7 * cfg.factor, 3)).astype(np.float32)


def verify(cfg: AutoencoderConfig, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Compare moments and decoded pictures, f32 at highest precision, with the AutoencoderKL of `file`; tolerance 1e-4
    relative.

    Without torch and diffusers only finiteness can be checked: `reference` is None, and the note says so.
    """
    images, mine = inputs(cfg), latents_and_pictures(cfg, params)

    libraries = ("torch", "diffusers")

    def reference() -> Check:
        name = "diffusers" + (RENAMED if format == "flax" else "")
        return compare(mine, _diffusers(file, images, mine[0], format), reference=name, libraries=libraries)

    missing = "torch and diffusers are not installed"
    return against(reference, mine, format, what="latents or pictures", needs=libraries, missing=missing)


def latents_and_pictures(cfg: AutoencoderConfig, params: Mapping[str, Any]) -> list[np.ndarray]:
    """Mean and logvar of the inputs' latents, and the pictures decoded from the means."""
    model = functional(Autoencoder, cfg)
    moments = outputs(partial(model.apply, method="encode"), params, inputs(cfg))
    return [*moments, *outputs(partial(model.apply, method="decode"), params, moments[0])]


def _diffusers(file: Path, images: np.ndarray, latents: np.ndarray, format: str) -> list[np.ndarray]:
    """Compute mean, logvar and decoded latents with diffusers, which reads the file and its config itself."""
    import torch
    from diffusers import AutoencoderKL

    with as_folder(file, FILE, format) as folder:
        model = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = model.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample
    return [x.permute(0, 2, 3, 1).numpy() for x in (posterior.mean, posterior.logvar, decoded)]


def _sidecars(donor: Donor, destination: Path, format: str) -> None:
    """An autoencoder has no sidecar files to copy."""


_COMPVIS = (
    "an autoencoder with CompVis' names: convert it with diffusers (AutoencoderKL.from_single_file(FILE),"
    " save_pretrained(DIR); for SDXL's, from_single_file(FILE, config='stabilityai/sdxl-vae'), as it is taken for that"
    " of Stable Diffusion, with another scale) and name that folder"
)
LOOKALIKES = (
    Lookalike("*encoder.down.0.block.0.norm1.weight", _COMPVIS),
    Lookalike(
        "*encoder.layers.*.conv*",
        "a tiny autoencoder (TAESD): only AutoencoderKL is read; take stabilityai/sd-vae-ft-ema",
    ),
    Lookalike(
        "decoder.up_blocks.0.resnets.0.norm1.weight", "half an AutoencoderKL, without its encoder: take the whole model"
    ),
    Lookalike(
        "encoder.down_blocks.0.resnets.0.norm1.weight",
        "half an AutoencoderKL, without its decoder: take the whole model",
    ),
    Lookalike(
        "encoder.down_blocks.0.resnets.0.conv1.conv.weight", "an autoencoder of videos: only AutoencoderKL is read"
    ),
)
FORMATS = (
    Format(name="diffusers", layout=DIFFUSERS, file=FILE, read_config=_read, write_config=_write, clean=clean),
    Format("flax", FLAX, "diffusion_flax_model.msgpack", read_config=_read_flax, write_config=_write_flax),
)
FAMILY = Family(
    name="autoencoder",
    module=Autoencoder,
    config=partial(from_json, AutoencoderConfig),
    formats=FORMATS,
    sidecars=_sidecars,
    verify=verify,
    parameters=parameters,
    macs=macs,
    outputs=latents_and_pictures,
    embedded={"icons_autoencoder": Path(__file__).parent / "icons" / "autoencoder"},
    lookalikes=LOOKALIKES,
)

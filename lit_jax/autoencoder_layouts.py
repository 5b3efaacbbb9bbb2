"""diffusers' AutoencoderKL in our names, both ways, and the proof that it computes the same."""

import re
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.checkpoint.convert import Donor, Family, Format, Found, Read
from common.checkpoint.unwrap import open_tensors
from common.checkpoint.verify import Check, compare
from common.checkpoint.weights import Tensors, read_json, write_json
from common.errors import InputError
from common.nn.functional import functional
from common.surgery.layout import Layout
from common.typed import from_json
from lit_jax.autoencoder import Autoencoder, AutoencoderConfig, macs, parameters

Rows = tuple[tuple[str, ...], ...]

# What diffusers can build and this model is not, with diffusers' defaults.
_FIXED: dict[str, Any] = dict(in_channels=3, out_channels=3, act_fn="silu", shift_factor=None, latents_mean=None, latents_std=None)
_FIXED |= dict(use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True)
_DEFAULTS: dict[str, Any] = dict(block_out_channels=[64], layers_per_block=1, latent_channels=4, norm_num_groups=32)
_DEFAULTS |= dict(scaling_factor=0.18215, sample_size=32)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _conv(ours: str, theirs: str) -> Rows:
    return ((f"{ours}/kernel", f"{theirs}.weight", "out in row col"), (f"{ours}/bias", f"{theirs}.bias"))


def _norm(ours: str, theirs: str) -> Rows:
    return ((f"{ours}/scale", f"{theirs}.weight"), (f"{ours}/bias", f"{theirs}.bias"))


def _resnet(ours: str, theirs: str) -> Rows:
    convs = dict(conv1="conv1", conv2="conv2", shortcut="conv_shortcut")
    norms = [row for n in ("norm1", "norm2") for row in _norm(f"{ours}/{n}", f"{theirs}.{n}")]
    return (*norms, *(row for a, b in convs.items() for row in _conv(f"{ours}/{a}", f"{theirs}.{b}")))


def _half(half: str, levels: str, resize: str) -> Rows:
    """The encoder or the decoder, which differ in what they call the levels and the step between them."""
    attention, middle = f"{half}.mid_block.attentions.0", f"{half}.mid_block.resnets"
    projections = dict(query="to_q", key="to_k", value="to_v", out="to_out.0")
    linear = ((f"{half}/middle/attn/{a}", f"{attention}.{b}") for a, b in projections.items())
    return (
        *_conv(f"{half}/input", f"{half}.conv_in"),
        *_resnet(f"{half}/{levels}/*/resnets/*", f"{half}.{levels}_blocks.*.resnets.*"),
        *_conv(f"{half}/{levels}/*/resize", f"{half}.{levels}_blocks.*.{resize}.0.conv"),
        *_resnet(f"{half}/middle/before", f"{middle}.0"),
        *_norm(f"{half}/middle/attn_norm", f"{attention}.group_norm"),
        *(row for a, b in linear for row in ((f"{a}/kernel", f"{b}.weight"), (f"{a}/bias", f"{b}.bias"))),
        *_resnet(f"{half}/middle/after", f"{middle}.1"),
        *_norm(f"{half}/norm", f"{half}.conv_norm_out"),
        *_conv(f"{half}/output", f"{half}.conv_out"),
    )


DIFFUSERS = Layout(
    "diffusers",
    (
        *_half("encoder", "down", "downsamplers"),
        *_conv("quant", "quant_conv"),
        *_conv("post_quant", "post_quant_conv"),
        *_half("decoder", "up", "upsamplers"),
    ),
)


def clean(key: str) -> str:
    """The current name of a tensor: the attention of older files (sd-vae-ft-* among them) has names of its own."""
    return re.sub(r"(?<=attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda old: _OLD_ATTENTION[old[0]], key)


def config(saved: Mapping[str, Any]) -> AutoencoderConfig:
    """The config of a weights folder of ours."""
    return from_json(AutoencoderConfig, saved)


def _read(tensors: Tensors, folder: Path) -> AutoencoderConfig | None:
    if not {"encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"} <= tensors.keys():
        return None
    if not (folder / "config.json").is_file():
        raise InputError("an AutoencoderKL of diffusers needs its config.json beside the weights; there is none")
    theirs = _DEFAULTS | read_json(folder / "config.json")
    for name, value in _FIXED.items():
        if theirs.get(name, value) != value:
            raise InputError(f"config.json: {name} is {theirs[name]!r}; only autoencoders where it is {value!r} are supported")
    blocks = {*theirs.get("down_block_types", ()), *theirs.get("up_block_types", ())} - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    if blocks:
        raise InputError(f"config.json: blocks of type {min(blocks)} are not supported, only DownEncoderBlock2D and UpDecoderBlock2D are")
    return AutoencoderConfig(
        channels=tuple(theirs["block_out_channels"]),
        resnets=theirs["layers_per_block"],
        latent=theirs["latent_channels"],
        groups=theirs["norm_num_groups"],
        scaling_factor=theirs["scaling_factor"],
        size=theirs["sample_size"],
    )


def _write(cfg: AutoencoderConfig, folder: Path) -> None:
    levels = len(cfg.channels)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    sizes = dict(block_out_channels=list(cfg.channels), layers_per_block=cfg.resnets, latent_channels=cfg.latent)
    rest = dict(norm_num_groups=cfg.groups, scaling_factor=cfg.scaling_factor, sample_size=cfg.size)
    write_json(folder / "config.json", dict(_class_name="AutoencoderKL") | _FIXED | blocks | sizes | rest)


def inputs(cfg: AutoencoderConfig) -> np.ndarray:
    """Two seeded pictures of 5 by 7 latent positions, f32 in [-1, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 5 * cfg.factor, 7 * cfg.factor, 3)).astype(np.float32)


def verify(cfg: AutoencoderConfig, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Compare moments and decoded pictures, f32 at highest precision, with the AutoencoderKL of `file`; tolerance 1e-4 relative.

    Without torch and diffusers only finiteness can be checked: `reference` is None, and the note says so.
    """
    images = inputs(cfg)
    model = functional(Autoencoder, cfg)
    full = {name: jnp.asarray(np.asarray(value), jnp.float32) for name, value in params.items()}
    with jax.default_matmul_precision("highest"):
        moments = jax.jit(partial(model.apply, method="encode"))(full, images)
        decoded = jax.jit(partial(model.apply, method="decode"))(full, moments.mean)
    mine = [np.array(x) for x in (*moments, decoded)]
    if not all(np.isfinite(x).all() for x in mine):
        return Check(passed=False, reference=None, note="latents or pictures are not finite")
    if format == "heirloom" or find_spec("torch") is None or find_spec("diffusers") is None:
        return Check(passed=True, reference=None, note="structure and finiteness only: torch and diffusers are not installed")
    theirs = _diffusers(file, images, mine[0])
    return compare(mine, theirs, reference="diffusers.AutoencoderKL", libraries=("torch", "diffusers"))


def _diffusers(file: Path, images: np.ndarray, latents: np.ndarray) -> list[np.ndarray]:
    """Mean, logvar and decoded latents as diffusers has them, from this very file."""
    import torch
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_config(AutoencoderKL.load_config(file.parent)).eval()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    tensors = {clean(key): torch.from_numpy(np.array(value, np.float32)) for key, value in open_tensors(file).items()}
    model.load_state_dict({key: value.reshape(shapes[key]) for key, value in tensors.items()})
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = model.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample
    return [x.permute(0, 2, 3, 1).numpy() for x in (posterior.mean, posterior.logvar, decoded)]


def _companions(donor: Donor, destination: Path, format: str) -> None:
    """An autoencoder travels alone."""


def _plain(read: Any) -> Any:
    def config(found: Found) -> Read | None:
        cfg = read(found.tensors, found.folder)
        return cfg and Read(cfg)

    return config


FORMATS = (Format("diffusers", DIFFUSERS, "diffusion_pytorch_model.safetensors", _plain(_read), _write, clean),)
FAMILY = Family("autoencoder", Autoencoder, config, FORMATS, _companions, verify, parameters, macs)

"""Converted DiTs against torch: diffusers' own class on its files, DiT's formulas in torch on those of facebookresearch
and LiT.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from heirloom.common.checkpoint.verify import (
    OWN,
    Check,
    against,
    as_folder,
    compare,
    importable,
    outputs,
    reference_tensors,
)
from heirloom.common.files import read_json
from heirloom.common.nn.block import Grid
from heirloom.common.nn.functional import functional
from heirloom.common.nn.position import sincos
from lit_jax.dit import FREQUENCIES, Dit, DitConfig
from lit_jax.formats import NORM_EPS
from lit_jax.pixart import PixArtConfig

EXAMPLES = 2
FILE = "diffusion_pytorch_model.safetensors"


def inputs(cfg: DitConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seeded inputs [2, size, size, channels] f32, times [2] int32 and labels [2] int32, the last of the table being
    the second.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EXAMPLES, cfg.size, cfg.size, cfg.channels)).astype(np.float32)
    return x, np.array([17, 903], np.int32), np.array([rng.integers(cfg.classes), cfg.rows - 1], np.int32)


def predictions(cfg: DitConfig, params: Mapping[str, Any]) -> list[np.ndarray]:
    """The model's prediction for these inputs, [2, size, size, 2 channels] f32."""
    return outputs(functional(Dit, cfg).apply, params, *inputs(cfg))


class AsDiffusers(Dit):
    """The same network with the two deviations of diffusers' class: timestep exponents over 127, and an eps of its own
    before the MLP.
    """

    def __init__(self, cfg: DitConfig, *, eps: float, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        self.time.divisor = FREQUENCIES // 2 - 1
        self.blocks.mlp_norm.eps = eps  # type: ignore[attr-defined]


def verify(cfg: DitConfig, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Compare predictions, f32 at highest precision, with torch on `file`; tolerance 1e-4 relative.

    A folder of diffusers is read by diffusers. Its class departs from DiT in two places, so our network is compared
    with these two switched; the note says how far that is from DiT's formulas, which a converted model keeps to. Of
    facebookresearch's and LiT's files no library reads the config: DiT's formulas in torch serve, and the check says
    so. Without torch only finiteness can be checked.
    """
    given = inputs(cfg)
    (ours,) = predictions(cfg, params)

    def reference() -> Check:
        if format == "diffusers" and importable("diffusers"):
            theirs = diffusers_prediction(file, *given)
            eps = float(read_json(file.parent / "config.json").get("norm_eps", NORM_EPS))
            switched = outputs(functional(partial(AsDiffusers, eps=eps), cfg).apply, params, *given)
            check = compare(switched, [theirs], reference="diffusers", libraries=("torch", "diffusers"))
            return replace(check, note=check.note or _difference(ours, theirs))
        tensors = {key: value.numpy() for key, value in reference_tensors(file).items()}
        theirs = formulas(cfg, _as_fair(tensors) if format == "diffusers" else tensors, *given)
        return compare([ours], [theirs], reference=OWN, libraries=("torch",))

    return against(reference, [ours], format, what="predictions")


def formulas(
    cfg: DitConfig, tensors: Mapping[str, np.ndarray], x: np.ndarray, t: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """DiT's forward pass in torch on tensors in its own names; [batch, size, size, 2 channels]."""
    import torch
    import torch.nn.functional as F

    w = {key: torch.from_numpy(np.array(value, np.float32)) for key, value in tensors.items()}

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Any, shift: Any, scale: Any) -> Any:
        return F.layer_norm(x, (cfg.width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    mix = softmax_mixing if cfg.attention == "softmax" else linear_mixing
    with torch.no_grad():
        features = timestep_features(torch.from_numpy(t))
        c = linear(F.silu(linear(features, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        c = F.silu(c + w["y_embedder.embedding_table.weight"][torch.from_numpy(labels).long()])
        y = F.conv2d(
            torch.from_numpy(x).permute(0, 3, 1, 2),
            w["x_embedder.proj.weight"],
            w["x_embedder.proj.bias"],
            stride=cfg.patch,
        )
        y = y.flatten(2).transpose(1, 2)
        y = y + torch.from_numpy(
            sincos(cfg.grid, cfg.grid, cfg.width).reshape(1, cfg.tokens, cfg.width)
        )  # a file's may be rounded
        for i in range(cfg.layers):
            m = linear(c, f"blocks.{i}.adaLN_modulation.1").chunk(6, 1)
            y = y + m[2][:, None] * mix(cfg, norm(y, m[0], m[1]), w, f"blocks.{i}.attn", linear, (cfg.grid, cfg.grid))
            z = F.gelu(linear(norm(y, m[3], m[4]), f"blocks.{i}.mlp.fc1"), approximate="tanh")
            y = y + m[5][:, None] * linear(z, f"blocks.{i}.mlp.fc2")
        m = linear(c, "final_layer.adaLN_modulation.1").chunk(2, 1)
        y = linear(norm(y, m[0], m[1]), "final_layer.linear")
        y = y.reshape(len(x), cfg.grid, cfg.grid, cfg.patch, cfg.patch, -1).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(len(x), cfg.size, cfg.size, -1).numpy()


Linear = Callable[[Any, str], Any]


def timestep_features(t: Any) -> Any:
    """Cosines, then sines, of times [batch], a torch tensor: [batch, 256]."""
    import torch

    angle = t.float()[:, None] * torch.exp(-np.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    return torch.cat([angle.cos(), angle.sin()], 1)


def softmax_mixing(
    cfg: DitConfig | PixArtConfig, x: Any, w: Mapping[str, Any], name: str, linear: Linear, grid: Grid
) -> Any:
    """Self-attention of DiT and PixArt on tensors `w` in their names. `linear(x, name)` applies a layer."""
    import torch.nn.functional as F

    tokens = grid[0] * grid[1]
    q, k, v = linear(x, f"{name}.qkv").reshape(len(x), tokens, 3, cfg.heads, cfg.head_dim).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), tokens, cfg.width)
    return linear(out, f"{name}.proj")


def linear_mixing(
    cfg: DitConfig | PixArtConfig, x: Any, w: Mapping[str, Any], name: str, linear: Linear, grid: Grid
) -> Any:
    """LiT's attention as its release writes it: sums, not our centred means. grid: rows and columns of the tokens."""
    import torch.nn.functional as F

    tokens = grid[0] * grid[1]

    def heads(x: Any) -> Any:
        return x.reshape(len(x), tokens, cfg.heads, cfg.head_dim).transpose(1, 2)

    q = linear(x, f"{name}.q")
    k, v = linear(x, f"{name}.kv").chunk(2, 2)
    q, k = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    if cfg.features == "focused":
        q, k = (z / F.softplus(w[f"{name}.scale"]) for z in (q, k))
        q, k = (z**3 / ((z**3).norm(dim=2, keepdim=True) + 1e-6) * z.norm(dim=2, keepdim=True) for z in (q, k))
    q, k, v = heads(q), heads(k), heads(v)
    z = 1 / (q @ k.mean(2, keepdim=True).transpose(2, 3) + 1e-6)
    out = q @ (k.transpose(2, 3) * tokens**-0.5 @ (v * tokens**-0.5)) * z
    out = out.transpose(1, 2).reshape(len(x), tokens, cfg.width)
    if cfg.filters != "none":
        weight, bias = w[f"{name}.dwc.weight"], w[f"{name}.dwc.bias"]
        images = v.transpose(2, 3).reshape(-1, len(weight), *grid)  # a shared bank sees heads as a batch
        conv = F.conv2d(images, weight, bias, padding=cfg.window // 2, groups=len(weight))
        out = out + conv.reshape(len(x), cfg.width, tokens).transpose(1, 2)
    return linear(out, f"{name}.proj")


def _as_fair(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' tensors under facebookresearch's names, by plain renaming and concatenation."""
    first = "transformer_blocks.0.norm1.emb"
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    names |= {f"{first}.timestep_embedder.linear_{n}": f"t_embedder.mlp.{2 * n - 2}" for n in (1, 2)}
    names |= {f"{first}.class_embedder.embedding_table": "y_embedder.embedding_table"}
    moved = [(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in names.items() for leaf in ("weight", "bias")]
    out = {ours: tensors[theirs] for theirs, ours in moved if theirs in tensors}
    inner = {
        "norm1.linear": "adaLN_modulation.1",
        "attn1.to_out.0": "attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }
    layers = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("transformer_blocks."))
    for i in range(layers):
        for leaf in ("weight", "bias"):
            out |= {
                f"blocks.{i}.{ours}.{leaf}": tensors[f"transformer_blocks.{i}.{theirs}.{leaf}"]
                for theirs, ours in inner.items()
            }
            out[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(
                [tensors[f"transformer_blocks.{i}.attn1.to_{p}.{leaf}"] for p in "qkv"]
            )
    return out


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How far diffusers' own class is from DiT's formulas on these weights."""
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    why = "with its two deviations from DiT (timestep exponents over 127, another eps before the MLP)"
    return f"{why}; the converted model keeps to DiT, and its prediction differs by {difference:.1e}"


def diffusers_prediction(file: Path, x: np.ndarray, t: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What `DiTTransformer2DModel` makes of the file and its config, [batch, size, size, 2 channels]."""
    import torch
    from diffusers import DiTTransformer2DModel

    with as_folder(file, FILE) as folder:
        model = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        images = torch.from_numpy(x).permute(0, 3, 1, 2)
        out = model(images, timestep=torch.from_numpy(t).long(), class_labels=torch.from_numpy(labels).long()).sample
    return out.permute(0, 2, 3, 1).numpy()

"""Converted PixArts against torch: diffusers' own class on its folders, PixArt's formulas in torch on .pth files of
PixArt and LiT.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
from heirloom.common.nn.functional import functional
from heirloom.common.nn.position import sincos
from lit_jax.pixart import PixArt, PixArtConfig
from lit_jax.pixart_layouts import DIFFUSERS, released
from lit_jax.verify import FILE, linear_mixing, softmax_mixing, timestep_features

EXAMPLES = 2
LARGEST = 32  # latent cells of a side: with random weights and a full-size model larger ones take minutes on a CPU
TOKENS = 20  # at most, of a text


class Inputs(NamedTuple):
    """x [2, row, col, channels] f32, t [2] f32, text [2, token, text_width] f32, mask [2, token] bool."""

    x: np.ndarray
    t: np.ndarray
    text: np.ndarray
    mask: np.ndarray


def inputs(cfg: PixArtConfig, *, square: bool) -> Inputs:
    """Seeded inputs with masks of two lengths and one fractional time. Square inputs have the trained size, if it is
    small; others are twice as wide as high.
    """
    rng = np.random.default_rng(0)
    side = max(cfg.patch, min(cfg.size, LARGEST) // cfg.patch * cfg.patch)
    short = max(cfg.patch, side // 2 // cfg.patch * cfg.patch)
    rows, cols = (side, side) if square else (short, 2 * short)
    x = rng.standard_normal((EXAMPLES, rows, cols, cfg.channels)).astype(np.float32)
    tokens = min(cfg.text_tokens, TOKENS)
    text = rng.standard_normal((EXAMPLES, tokens, cfg.text_width)).astype(np.float32)
    mask = np.arange(tokens) < np.array([[1 + tokens // 3], [tokens]])
    return Inputs(x, np.array([17.25, 903.0], np.float32), text, mask)


def verify(cfg: PixArtConfig, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Compare predictions on square and other latents, f32 at highest precision, with torch on `file`; tolerance 1e-4
    relative.

    A folder of diffusers is read by diffusers. Of .pth files no library reads the config: PixArt's formulas in torch
    serve, and the check says so. Without torch only finiteness can be checked.
    """
    given, ours = examples(cfg), predicted(cfg, params)

    def reference() -> Check:
        if format == "diffusers" and importable("diffusers"):
            theirs = diffusers_predictions(file, given)
            return compare(ours, theirs, reference="diffusers", libraries=("torch", "diffusers"))
        tensors = {key: value.numpy() for key, value in reference_tensors(file).items()}
        tensors = as_released(cfg, tensors) if format == "diffusers" else tensors
        theirs = [formulas(cfg, tensors, one) for one in given]
        return compare(ours, theirs, reference=OWN, libraries=("torch",))

    return against(reference, ours, format, what="predictions")


def examples(cfg: PixArtConfig) -> list[Inputs]:
    """A square and a wide input."""
    return [inputs(cfg, square=square) for square in (True, False)]


def predicted(cfg: PixArtConfig, params: Mapping[str, Any]) -> list[np.ndarray]:
    """Our model's predictions for the examples, [2, row, col, 2 channels] f32 each."""
    apply = functional(PixArt, cfg).apply
    return [outputs(apply, params, *one)[0] for one in examples(cfg)]


def diffusers_predictions(file: Path, given: list[Inputs]) -> list[np.ndarray]:
    """What `PixArtTransformer2DModel` makes of the file and its config, [batch, row, col, 2 channels] each."""
    import torch
    from diffusers import PixArtTransformer2DModel

    with as_folder(file, FILE) as folder:
        model = PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    model.eval()
    out = []
    with torch.no_grad():
        for one in given:
            x, t, text, mask = map(torch.from_numpy, one)
            drawn = model(
                x.permute(0, 3, 1, 2), encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask.long()
            )
            out.append(drawn.sample.permute(0, 2, 3, 1).numpy())
    return out


def formulas(cfg: PixArtConfig, tensors: Mapping[str, np.ndarray], given: Inputs) -> np.ndarray:
    """PixArt's forward pass in torch on tensors in the names of .pth files; [batch, row, col, 2 channels]."""
    import torch
    import torch.nn.functional as F

    w = {key: torch.from_numpy(np.array(value, np.float32)) for key, value in tensors.items()}
    x, t, text, mask = map(torch.from_numpy, given)
    n, rows, cols = len(x), x.shape[1] // cfg.patch, x.shape[2] // cfg.patch

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Any, shift: Any, scale: Any) -> Any:
        return F.layer_norm(x, (cfg.width,), eps=1e-6) * (1 + scale) + shift

    def cross(x: Any, text: Any, name: str) -> Any:
        q = linear(x, f"{name}.q_linear")
        k, v = linear(text, f"{name}.kv_linear").chunk(2, 2)
        q, k, v = (z.reshape(n, z.shape[1], cfg.cross_heads, cfg.cross_head_dim).transpose(1, 2) for z in (q, k, v))
        scores = (q @ k.transpose(2, 3) * cfg.cross_head_dim**-0.5).masked_fill(~mask[:, None, None], -torch.inf)
        return linear((scores.softmax(3) @ v).transpose(1, 2).reshape(x.shape), f"{name}.proj")

    mix = softmax_mixing if cfg.attention == "softmax" else linear_mixing
    with torch.no_grad():
        c = linear(F.silu(linear(timestep_features(t), "t_embedder.mlp.0")), "t_embedder.mlp.2")
        shared = linear(F.silu(c), "t_block.1").reshape(n, 6, cfg.width)
        text = linear(F.gelu(linear(text, "y_embedder.y_proj.fc1"), approximate="tanh"), "y_embedder.y_proj.fc2")
        weight, bias = w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=cfg.patch).flatten(2).transpose(1, 2)
        y = y + torch.from_numpy(sincos(rows, cols, cfg.width, cfg.span)).reshape(rows * cols, cfg.width)
        for i in range(cfg.layers):
            m = (w[f"blocks.{i}.scale_shift_table"] + shared).chunk(6, 1)
            y = y + m[2] * mix(cfg, norm(y, m[0], m[1]), w, f"blocks.{i}.attn", linear, (rows, cols))
            y = y + cross(y, text, f"blocks.{i}.cross_attn")
            z = F.gelu(linear(norm(y, m[3], m[4]), f"blocks.{i}.mlp.fc1"), approximate="tanh")
            y = y + m[5] * linear(z, f"blocks.{i}.mlp.fc2")
        shift, scale = (w["final_layer.scale_shift_table"] + c[:, None]).chunk(2, 1)
        y = linear(norm(y, shift, scale), "final_layer.linear")
        y = y.reshape(n, rows, cols, cfg.patch, cfg.patch, -1).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(n, rows * cfg.patch, cols * cfg.patch, -1).numpy()


def as_released(cfg: PixArtConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' tensors under the names of .pth files, packed where those are."""
    spec = functional(PixArt, cfg).spec
    views = DIFFUSERS.view(dict(tensors), spec)
    layout = released(cfg)
    out = {key: np.empty(tensor.shape, np.float32) for key, tensor in layout.foreign(spec).items()}
    for path, view in layout.view(out, spec).items():
        view.write(views[path])
    return out

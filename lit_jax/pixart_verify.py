"""Converted PixArts against torch: diffusers' class on its own folders; on PixArt's and LiT's files with our
reading.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.verify import OWN, Check, against, as_folder, compare, outputs, reference_tensors
from heirloom.common.nn.functional import functional
from lit_jax.pixart import PixArt, PixArtConfig
from lit_jax.pixart_formats import FILE, diffusers_config

LIBRARIES = ("torch", "diffusers")
TOKENS = (5, 12)  # of the two texts; the longer one fills the mask
_RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def inputs(cfg: PixArtConfig, rows: int, cols: int) -> tuple[np.ndarray, ...]:
    """Seeded latents [2, rows, cols, channels], times [2] (one fractional), texts and their masks [2, 12]."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, rows, cols, cfg.channels)).astype(np.float32)
    text = rng.standard_normal((2, max(TOKENS), cfg.text_width)).astype(np.float32)
    return x, np.array([17, 902.5], np.float32), text, np.arange(max(TOKENS)) < np.array(TOKENS)[:, None]


def verify(cfg: PixArtConfig, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Compare predictions for a square and a wide picture, f32 at highest precision; tolerance 1e-4 relative.

    A folder of diffusers is read by diffusers. Of PixArt's and LiT's files no library reads the config: diffusers'
    class serves with the config that we read, LiT's attention as a formula in torch, and the check says so.
    """
    given, ours = examples(cfg), predicted(cfg, params)

    def reference() -> Check:
        if format == "diffusers":
            theirs = predictions(read_by_diffusers(file), given)
            return compare(ours, theirs, reference="diffusers", libraries=LIBRARIES)
        theirs = predictions(built_by_us(cfg, file), given)
        return compare(ours, theirs, reference=OWN, libraries=LIBRARIES)

    missing = "torch and diffusers are not installed"
    return against(reference, ours, format, what="predictions", needs=LIBRARIES, missing=missing)


def examples(cfg: PixArtConfig) -> list[tuple[np.ndarray, ...]]:
    """The inputs of a square and of a wide picture."""
    return [inputs(cfg, 8 * cfg.patch, 8 * cfg.patch), inputs(cfg, 4 * cfg.patch, 10 * cfg.patch)]


def predicted(cfg: PixArtConfig, params: Mapping[str, Any]) -> list[np.ndarray]:
    """Our model's predictions for the examples, [2, row, col, 2 channels] f32 each."""
    apply = functional(PixArt, cfg).apply
    return [outputs(apply, params, *given)[0] for given in examples(cfg)]


def predictions(model: Any, given: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """What a PixArtTransformer2DModel predicts, [batch, row, col, 2 channels] for each set of inputs."""
    import torch

    found = []
    with torch.no_grad():
        for x, t, text, mask in given:
            tensors = dict(encoder_hidden_states=text, encoder_attention_mask=mask.astype(np.float32), timestep=t)
            arguments = {name: torch.from_numpy(value) for name, value in tensors.items()}
            for block in model.transformer_blocks:  # LiT's attention needs it; diffusers' own ignores it
                block.attn1.grid = x.shape[1] // model.config.patch_size, x.shape[2] // model.config.patch_size
            out = model(torch.from_numpy(x).permute(0, 3, 1, 2), **arguments).sample
            found.append(out.permute(0, 2, 3, 1).numpy())
    return found


def read_by_diffusers(file: Path) -> Any:
    """The model of a folder, read by diffusers alone."""
    import torch
    from diffusers import PixArtTransformer2DModel

    with as_folder(file, FILE) as folder:
        return PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval()


def built_by_us(cfg: PixArtConfig, file: Path) -> Any:
    """diffusers' class with the config that we read and a file's tensors under diffusers' names."""
    import torch
    from diffusers import PixArtTransformer2DModel

    tensors = {key: value.float() for key, value in reference_tensors(file).items()}
    settings = {k: v for k, v in diffusers_config(cfg).items() if not k.startswith("_")}
    settings |= dict(num_attention_heads=cfg.cross_heads, attention_head_dim=cfg.width // cfg.cross_heads)
    model: Any = PixArtTransformer2DModel(**settings)
    model.eval()
    state: dict[str, Any] = {}
    for theirs, name in _RENAMED.items():
        state |= {f"{name}.{leaf}": tensors[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")}
    state["scale_shift_table"] = tensors["final_layer.scale_shift_table"]
    for i, block in enumerate(model.transformer_blocks):
        here, there = f"blocks.{i}", f"transformer_blocks.{i}"
        state[f"{there}.scale_shift_table"] = tensors[f"{here}.scale_shift_table"]
        for leaf in ("weight", "bias"):
            state |= {f"{there}.{b}.{leaf}": tensors[f"{here}.{a}.{leaf}"] for a, b in _IN_BLOCK.items()}
            keys, values = tensors[f"{here}.cross_attn.kv_linear.{leaf}"].chunk(2)
            state |= {f"{there}.attn2.to_k.{leaf}": keys, f"{there}.attn2.to_v.{leaf}": values}
        if cfg.attention == "softmax":
            for leaf in ("weight", "bias"):
                parts = tensors[f"{here}.attn.qkv.{leaf}"].chunk(3)
                state |= {f"{there}.attn1.to_{p}.{leaf}": part for p, part in zip("qkv", parts, strict=True)}
        else:
            block.attn1 = _linear_attention(cfg, {k: v for k, v in tensors.items() if k.startswith(f"{here}.attn.")}, i)
            for leaf in ("weight", "bias"):
                del state[f"{there}.attn1.to_out.0.{leaf}"]
    model.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()})
    return model


def _linear_attention(cfg: PixArtConfig, tensors: Mapping[str, Any], layer: int) -> Any:
    """LiT's attention as a module of torch that stands in for diffusers' self-attention."""
    import torch
    import torch.nn.functional as F

    from lit_jax.verify import linear_attention_in_torch

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    class Mixing(torch.nn.Module):
        grid: tuple[int, int]

        def forward(self, x: Any, **_: Any) -> Any:
            return linear_attention_in_torch(cfg, x, tensors, f"blocks.{layer}.attn", linear, self.grid)

    return Mixing()

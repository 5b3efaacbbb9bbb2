"""A ViT's forward pass in torch on tensors in timm's names: the check of files that no library reads by itself."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from heirloom.common.checkpoint.verify import torch_activation
from heirloom.common.vit.model import VitConfig


def formulas(cfg: VitConfig, tensors: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Logits [batch, classes], or pooled features where there is no head, of pictures [batch, height, width, channel].

    A part is computed where its tensors are.
    """
    import torch
    import torch.nn.functional as F

    w = {key: torch.from_numpy(np.array(value, np.float32)) for key, value in tensors.items()}
    activation = torch_activation(cfg.activation)

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias")) if f"{name}.weight" in w else x

    def norm(x: Any, name: str) -> Any:
        if f"{name}.weight" not in w:
            return x
        return F.layer_norm(x, w[f"{name}.weight"].shape, w[f"{name}.weight"], w[f"{name}.bias"], cfg.eps)

    def heads(x: Any) -> Any:
        return x.unflatten(-1, (cfg.heads, cfg.head_dim)).transpose(1, 2)

    def mlp(x: Any, name: str) -> Any:
        up = linear(x, f"{name}.fc1")
        gate, up = up.chunk(2, -1) if cfg.gated else (up, 1.0)
        return linear(norm(activation(gate) * up, f"{name}.norm"), f"{name}.fc2")

    with torch.no_grad():
        images = torch.from_numpy(x).permute(0, 3, 1, 2)
        y = F.conv2d(images, w["patch_embed.proj.weight"], w.get("patch_embed.proj.bias"), stride=cfg.patch)
        y = y.flatten(2).transpose(1, 2)
        front = [w[key].expand(len(y), -1, -1) for key in ("cls_token", "dist_token", "reg_token") if key in w]
        y = torch.cat([*front, y], 1)
        position = w["pos_embed"]
        gap = y.new_zeros(1, cfg.prefix - cfg.placed, cfg.width)  # tokens without a position
        y = y + torch.cat([position[:, : cfg.placed], gap, position[:, cfg.placed :]], 1)
        y = norm(y, "norm_pre")
        for i in range(cfg.depth):
            block = f"blocks.{i}"
            q, k, v = map(heads, linear(norm(y, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, -1))
            q, k = norm(q, f"{block}.attn.q_norm"), norm(k, f"{block}.attn.k_norm")
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            mixed = linear(norm(mixed, f"{block}.attn.norm"), f"{block}.attn.proj")
            y = y + mixed * w.get(f"{block}.ls1.gamma", 1.0)
            y = y + mlp(norm(y, f"{block}.norm2"), f"{block}.mlp") * w.get(f"{block}.ls2.gamma", 1.0)
        if cfg.pool == "mean_norm":
            return linear(norm(y[:, cfg.prefix :].mean(1), "fc_norm"), "head").numpy()
        y = norm(y, "norm")
        if cfg.pool == "norm_mean":
            return linear(y[:, cfg.prefix :].mean(1), "head").numpy()
        if cfg.pool == "map":
            k, v = map(heads, linear(y[:, cfg.prefix :], "attn_pool.kv").chunk(2, -1))
            q = heads(linear(w["attn_pool.latent"].expand(len(y), -1, -1), "attn_pool.q"))
            y = linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), "attn_pool.proj")
            y = y + mlp(norm(y, "attn_pool.norm"), "attn_pool.mlp")
        logits = linear(y[:, 0], "head")
        return ((logits + linear(y[:, 1], "head_dist")) / 2 if cfg.pool == "cls+dist" else logits).numpy()

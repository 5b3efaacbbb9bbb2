"""Layouts of foreign DiT and LiT checkpoints: facebookresearch/DiT and diffusers."""

from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import Layout
from heirloom.common.surgery.rows import PATCH, Rows, module, packed
from lit_jax.dit import DitConfig
from lit_jax.pixart import PixArtConfig


def self_attention(cfg: DitConfig | PixArtConfig) -> Rows:
    """Rows of self-attention in facebookresearch/DiT's and PixArt's files; with linear attention, in LiT's release."""
    ours, theirs = "blocks/attn", "blocks.{layer}.attn"
    out = module(f"{ours}/out", f"{theirs}.proj")
    if cfg.attention == "softmax":
        return (*packed(tuple(f"{ours}/{p}" for p in ("query", "key", "value")), f"{theirs}.qkv"), *out)
    channels = "head_dim" if cfg.filters == "shared" else "(head head_dim)"
    return (
        *module(f"{ours}/query", f"{theirs}.q"),
        *packed((f"{ours}/key", f"{ours}/value"), f"{theirs}.kv"),
        (f"{ours}/depthwise/kernel", f"{theirs}.dwc.weight", f"{channels} 1 filter_row filter_col"),
        (f"{ours}/depthwise/bias", f"{theirs}.dwc.bias", channels),
        (f"{ours}/scale", f"{theirs}.scale", "1 1 (head head_dim)"),
        *out,
    )


def fair(cfg: DitConfig) -> Layout:
    """Make the layout of facebookresearch/DiT; with linear attention, of LiT's release."""
    return Layout(
        name="fair",
        rows=(
            ("patch/project/kernel", "x_embedder.proj.weight", PATCH),
            ("patch/project/bias", "x_embedder.proj.bias"),
            *module("time/up", "t_embedder.mlp.0"),
            *module("time/down", "t_embedder.mlp.2"),
            ("label/table", "y_embedder.embedding_table.weight", "label embed"),
            *module("modulation", "blocks.{layer}.adaLN_modulation.1"),
            *self_attention(cfg),
            *module("blocks/mlp/up", "blocks.{layer}.mlp.fc1"),
            *module("blocks/mlp/down", "blocks.{layer}.mlp.fc2"),
            *module("final_modulation", "final_layer.adaLN_modulation.1"),
            *module("final", "final_layer.linear"),
        ),
        constant={"pos_embed": sincos(cfg.grid, cfg.grid, cfg.width).reshape(1, cfg.tokens, cfg.width)},
    )


DIFFUSERS = Layout(
    name="diffusers",
    rows=(
        ("patch/project/kernel", "pos_embed.proj.weight", PATCH),
        ("patch/project/bias", "pos_embed.proj.bias"),
        # Every block has a copy of the embedders.
        *module("time/up", "transformer_blocks.{layer}.norm1.emb.timestep_embedder.linear_1"),
        *module("time/down", "transformer_blocks.{layer}.norm1.emb.timestep_embedder.linear_2"),
        ("label/table", "transformer_blocks.{layer}.norm1.emb.class_embedder.embedding_table.weight", "label embed"),
        *module("modulation", "transformer_blocks.{layer}.norm1.linear"),
        *module("blocks/attn/query", "transformer_blocks.{layer}.attn1.to_q"),
        *module("blocks/attn/key", "transformer_blocks.{layer}.attn1.to_k"),
        *module("blocks/attn/value", "transformer_blocks.{layer}.attn1.to_v"),
        *module("blocks/attn/out", "transformer_blocks.{layer}.attn1.to_out.0"),
        *module("blocks/mlp/up", "transformer_blocks.{layer}.ff.net.0.proj"),
        *module("blocks/mlp/down", "transformer_blocks.{layer}.ff.net.2"),
        *module("final_modulation", "proj_out_1"),
        *module("final", "proj_out_2"),
    ),
    ignore=("pos_embed.pos_embed",),
    differs=(
        "diffusers trains embedders for each block, and a DiT has one set: only DiTs that were converted to diffusers"
        " are read"
    ),
)

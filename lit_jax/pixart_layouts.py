"""Layouts of foreign PixArt-Sigma and text-to-image LiT checkpoints: the released .pth files and diffusers."""

from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import Layout
from heirloom.common.surgery.rows import PATCH, module, packed
from lit_jax.layouts import self_attention
from lit_jax.pixart import PixArtConfig

TABLE = "part embed"


def released(cfg: PixArtConfig) -> Layout:
    """Make the layout of PixArt-Sigma's .pth files; with linear attention, of LiT's."""
    cross = "blocks.{layer}.cross_attn"
    table = sincos(cfg.grid, cfg.grid, cfg.width, cfg.span)
    return Layout(
        name="pixart",
        rows=(
            ("patch/project/kernel", "x_embedder.proj.weight", PATCH),
            ("patch/project/bias", "x_embedder.proj.bias"),
            *module("time/up", "t_embedder.mlp.0"),
            *module("time/down", "t_embedder.mlp.2"),
            *module("caption/up", "y_embedder.y_proj.fc1"),
            *module("caption/down", "y_embedder.y_proj.fc2"),
            ("null_text", "y_embedder.y_embedding", "token text_embed"),
            *module("modulation", "t_block.1"),
            ("table", "blocks.{layer}.scale_shift_table", TABLE),
            *self_attention(cfg),
            *module("blocks/cross/query", f"{cross}.q_linear"),
            *packed(("memory/key", "memory/value"), f"{cross}.kv_linear"),
            *module("blocks/cross/out", f"{cross}.proj"),
            *module("blocks/mlp/up", "blocks.{layer}.mlp.fc1"),
            *module("blocks/mlp/down", "blocks.{layer}.mlp.fc2"),
            ("final_table", "final_layer.scale_shift_table", TABLE),
            *module("final", "final_layer.linear"),
        ),
        constant={"pos_embed": table.reshape(1, cfg.tokens, cfg.width)},
    )


DIFFUSERS = Layout(
    name="diffusers",
    rows=(
        ("patch/project/kernel", "pos_embed.proj.weight", PATCH),
        ("patch/project/bias", "pos_embed.proj.bias"),
        *module("time/up", "adaln_single.emb.timestep_embedder.linear_1"),
        *module("time/down", "adaln_single.emb.timestep_embedder.linear_2"),
        *module("caption/up", "caption_projection.linear_1"),
        *module("caption/down", "caption_projection.linear_2"),
        *module("modulation", "adaln_single.linear"),
        ("table", "transformer_blocks.{layer}.scale_shift_table", TABLE),
        *module("blocks/attn/query", "transformer_blocks.{layer}.attn1.to_q"),
        *module("blocks/attn/key", "transformer_blocks.{layer}.attn1.to_k"),
        *module("blocks/attn/value", "transformer_blocks.{layer}.attn1.to_v"),
        *module("blocks/attn/out", "transformer_blocks.{layer}.attn1.to_out.0"),
        *module("blocks/cross/query", "transformer_blocks.{layer}.attn2.to_q"),
        *module("memory/key", "transformer_blocks.{layer}.attn2.to_k"),
        *module("memory/value", "transformer_blocks.{layer}.attn2.to_v"),
        *module("blocks/cross/out", "transformer_blocks.{layer}.attn2.to_out.0"),
        *module("blocks/mlp/up", "transformer_blocks.{layer}.ff.net.0.proj"),
        *module("blocks/mlp/down", "transformer_blocks.{layer}.ff.net.2"),
        ("final_table", "scale_shift_table", TABLE),
        *module("final", "proj_out"),
    ),
    ignore=("pos_embed.pos_embed",),
    omit=("null_text",),
)

"""Layouts of foreign PixArt-Sigma and text-to-image LiT checkpoints: the released .pth files and diffusers."""

from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import Layout
from lit_jax.layouts import PATCH, linear, packed, self_attention
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
            *linear("time/up", "t_embedder.mlp.0"),
            *linear("time/down", "t_embedder.mlp.2"),
            *linear("caption/up", "y_embedder.y_proj.fc1"),
            *linear("caption/down", "y_embedder.y_proj.fc2"),
            ("null_text", "y_embedder.y_embedding", "token text_embed"),
            *linear("modulation", "t_block.1"),
            ("table", "blocks.{layer}.scale_shift_table", TABLE),
            *self_attention(cfg),
            *linear("blocks/cross/query", f"{cross}.q_linear"),
            *packed("memory", ("key", "value"), f"{cross}.kv_linear"),
            *linear("blocks/cross/out", f"{cross}.proj"),
            *linear("blocks/mlp/up", "blocks.{layer}.mlp.fc1"),
            *linear("blocks/mlp/down", "blocks.{layer}.mlp.fc2"),
            ("final_table", "final_layer.scale_shift_table", TABLE),
            *linear("final", "final_layer.linear"),
        ),
        constant={"pos_embed": table.reshape(1, cfg.tokens, cfg.width)},
    )


DIFFUSERS = Layout(
    name="diffusers",
    rows=(
        ("patch/project/kernel", "pos_embed.proj.weight", PATCH),
        ("patch/project/bias", "pos_embed.proj.bias"),
        *linear("time/up", "adaln_single.emb.timestep_embedder.linear_1"),
        *linear("time/down", "adaln_single.emb.timestep_embedder.linear_2"),
        *linear("caption/up", "caption_projection.linear_1"),
        *linear("caption/down", "caption_projection.linear_2"),
        *linear("modulation", "adaln_single.linear"),
        ("table", "transformer_blocks.{layer}.scale_shift_table", TABLE),
        *linear("blocks/attn/query", "transformer_blocks.{layer}.attn1.to_q"),
        *linear("blocks/attn/key", "transformer_blocks.{layer}.attn1.to_k"),
        *linear("blocks/attn/value", "transformer_blocks.{layer}.attn1.to_v"),
        *linear("blocks/attn/out", "transformer_blocks.{layer}.attn1.to_out.0"),
        *linear("blocks/cross/query", "transformer_blocks.{layer}.attn2.to_q"),
        *linear("memory/key", "transformer_blocks.{layer}.attn2.to_k"),
        *linear("memory/value", "transformer_blocks.{layer}.attn2.to_v"),
        *linear("blocks/cross/out", "transformer_blocks.{layer}.attn2.to_out.0"),
        *linear("blocks/mlp/up", "transformer_blocks.{layer}.ff.net.0.proj"),
        *linear("blocks/mlp/down", "transformer_blocks.{layer}.ff.net.2"),
        ("final_table", "scale_shift_table", TABLE),
        *linear("final", "proj_out"),
    ),
    ignore=("pos_embed.pos_embed",),
    omit=("null_text",),
)

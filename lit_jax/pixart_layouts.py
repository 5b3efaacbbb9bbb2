"""Layouts of foreign PixArt-Σ checkpoints: PixArt's own files, LiT's text-to-image release, and diffusers."""

from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import Layout
from lit_jax.layouts import PATCH, linear_rows, mixing, packed
from lit_jax.pixart import PixArtConfig


def pixart(cfg: PixArtConfig) -> Layout:
    """Make the layout of PixArt-Σ's files; with linear attention, of LiT's text-to-image release."""
    cross = "blocks.{layer}.cross_attn"
    return Layout(
        name="pixart",
        rows=(
            ("patch/project/kernel", "x_embedder.proj.weight", PATCH),
            ("patch/project/bias", "x_embedder.proj.bias"),
            *linear_rows("time/up", "t_embedder.mlp.0"),
            *linear_rows("time/down", "t_embedder.mlp.2"),
            *linear_rows("modulation", "t_block.1"),
            *linear_rows("caption_up", "y_embedder.y_proj.fc1"),
            *linear_rows("caption_down", "y_embedder.y_proj.fc2"),
            ("null_text", "y_embedder.y_embedding", "text_token text"),
            ("blocks/table", "blocks.{layer}.scale_shift_table", "part embed"),
            *mixing(cfg.attention, cfg.filters),
            *packed("blocks/cross", ("query",), f"{cross}.q_linear"),
            *packed("blocks/cross", ("key", "value"), f"{cross}.kv_linear"),
            *linear_rows("blocks/cross/out", f"{cross}.proj"),
            *linear_rows("blocks/mlp/up", "blocks.{layer}.mlp.fc1"),
            *linear_rows("blocks/mlp/down", "blocks.{layer}.mlp.fc2"),
            ("final_table", "final_layer.scale_shift_table", "part embed"),
            *linear_rows("final", "final_layer.linear"),
        ),
        # The table of the square size, which PixArt computes anew for each picture.
        constant={"pos_embed": sincos(cfg.grid, cfg.grid, cfg.width, cfg.interpolation).reshape(1, cfg.tokens, -1)},
    )


def _attention(ours: str, theirs: str) -> tuple[tuple[str, ...], ...]:
    names = dict(query="to_q", key="to_k", value="to_v", out="to_out.0")
    return tuple(row for a, b in names.items() for row in linear_rows(f"{ours}/{a}", f"{theirs}.{b}"))


DIFFUSERS = Layout(
    name="diffusers",
    rows=(
        ("patch/project/kernel", "pos_embed.proj.weight", PATCH),
        ("patch/project/bias", "pos_embed.proj.bias"),
        *linear_rows("time/up", "adaln_single.emb.timestep_embedder.linear_1"),
        *linear_rows("time/down", "adaln_single.emb.timestep_embedder.linear_2"),
        *linear_rows("modulation", "adaln_single.linear"),
        *linear_rows("caption_up", "caption_projection.linear_1"),
        *linear_rows("caption_down", "caption_projection.linear_2"),
        ("blocks/table", "transformer_blocks.{layer}.scale_shift_table", "part embed"),
        *_attention("blocks/attn", "transformer_blocks.{layer}.attn1"),
        *_attention("blocks/cross", "transformer_blocks.{layer}.attn2"),
        *linear_rows("blocks/mlp/up", "transformer_blocks.{layer}.ff.net.0.proj"),
        *linear_rows("blocks/mlp/down", "transformer_blocks.{layer}.ff.net.2"),
        ("final_table", "scale_shift_table", "part embed"),
        *linear_rows("final", "proj_out"),
    ),
    ignore=("pos_embed.pos_embed",),
)

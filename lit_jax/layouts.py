"""Layouts of foreign DiT and LiT checkpoints: facebookresearch/DiT and diffusers."""

from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import Layout
from lit_jax.dit import DitConfig

Rows = tuple[tuple[str, ...], ...]
PATCH = "embed channel patch_row patch_col"


def _linear(ours: str, theirs: str) -> Rows:
    return ((f"{ours}/kernel", f"{theirs}.weight"), (f"{ours}/bias", f"{theirs}.bias"))


def _packed(ours: tuple[str, ...], theirs: str) -> Rows:
    """Rows for several projections packed into one matrix, in this order."""
    return tuple(
        (" + ".join(f"blocks/attn/{p}/{leaf}" for p in ours), f"{theirs}.{name}") for leaf, name in _LEAVES.items()
    )


_LEAVES = {"kernel": "weight", "bias": "bias"}


def fair(cfg: DitConfig) -> Layout:
    """Make the layout of facebookresearch/DiT; with linear attention, of LiT's release."""
    attn = "blocks.{layer}.attn"
    if cfg.attention == "softmax":
        mixing: Rows = _packed(("query", "key", "value"), f"{attn}.qkv")
    else:
        channels = "head_dim" if cfg.filters == "shared" else "(head head_dim)"
        mixing = (
            *_packed(("query",), f"{attn}.q"),
            *_packed(("key", "value"), f"{attn}.kv"),
            ("blocks/attn/depthwise/kernel", f"{attn}.dwc.weight", f"{channels} 1 filter_row filter_col"),
            ("blocks/attn/depthwise/bias", f"{attn}.dwc.bias", channels),
            ("blocks/attn/scale", f"{attn}.scale", "1 1 (head head_dim)"),
        )
    return Layout(
        name="fair",
        rows=(
            ("patch/project/kernel", "x_embedder.proj.weight", PATCH),
            ("patch/project/bias", "x_embedder.proj.bias"),
            *_linear("time/up", "t_embedder.mlp.0"),
            *_linear("time/down", "t_embedder.mlp.2"),
            ("label/table", "y_embedder.embedding_table.weight", "label embed"),
            *_linear("modulation", "blocks.{layer}.adaLN_modulation.1"),
            *mixing,
            *_linear("blocks/attn/out", f"{attn}.proj"),
            *_linear("blocks/mlp/up", "blocks.{layer}.mlp.fc1"),
            *_linear("blocks/mlp/down", "blocks.{layer}.mlp.fc2"),
            *_linear("final_modulation", "final_layer.adaLN_modulation.1"),
            *_linear("final", "final_layer.linear"),
        ),
        constant={"pos_embed": sincos(cfg.grid, cfg.grid, cfg.width).reshape(1, cfg.tokens, cfg.width)},
    )


DIFFUSERS = Layout(
    name="diffusers",
    rows=(
        ("patch/project/kernel", "pos_embed.proj.weight", PATCH),
        ("patch/project/bias", "pos_embed.proj.bias"),
        # Every block has a copy of the embedders.
        *_linear("time/up", "transformer_blocks.{layer}.norm1.emb.timestep_embedder.linear_1"),
        *_linear("time/down", "transformer_blocks.{layer}.norm1.emb.timestep_embedder.linear_2"),
        ("label/table", "transformer_blocks.{layer}.norm1.emb.class_embedder.embedding_table.weight", "label embed"),
        *_linear("modulation", "transformer_blocks.{layer}.norm1.linear"),
        *_linear("blocks/attn/query", "transformer_blocks.{layer}.attn1.to_q"),
        *_linear("blocks/attn/key", "transformer_blocks.{layer}.attn1.to_k"),
        *_linear("blocks/attn/value", "transformer_blocks.{layer}.attn1.to_v"),
        *_linear("blocks/attn/out", "transformer_blocks.{layer}.attn1.to_out.0"),
        *_linear("blocks/mlp/up", "transformer_blocks.{layer}.ff.net.0.proj"),
        *_linear("blocks/mlp/down", "transformer_blocks.{layer}.ff.net.2"),
        *_linear("final_modulation", "proj_out_1"),
        *_linear("final", "proj_out_2"),
    ),
    ignore=("pos_embed.pos_embed",),
    differs=(
        "diffusers trains embedders for each block, and a DiT has one set: only DiTs that were converted to diffusers"
        " are read"
    ),
)

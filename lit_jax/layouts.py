"""Layouts of foreign DiT and LiT checkpoints: facebookresearch/DiT and diffusers."""

from heirloom.common.nn.position import sincos
from heirloom.common.surgery.layout import Layout
from lit_jax.dit import DitConfig

Rows = tuple[tuple[str, ...], ...]
PATCH = "embed channel patch_row patch_col"


def linear_rows(ours: str, theirs: str) -> Rows:
    """Rows of a linear layer."""
    return ((f"{ours}/kernel", f"{theirs}.weight"), (f"{ours}/bias", f"{theirs}.bias"))


def packed(module: str, ours: tuple[str, ...], theirs: str) -> Rows:
    """Rows for several projections of a module, packed into one matrix in this order."""
    leaves = {"kernel": "weight", "bias": "bias"}
    return tuple(
        (" + ".join(f"{module}/{p}/{leaf}" for p in ours), f"{theirs}.{name}") for leaf, name in leaves.items()
    )


def mixing(attention: str, filters: str) -> Rows:
    """Rows of self-attention in the files of DiT and PixArt; of linear attention, in those of LiT's release."""
    attn, of = "blocks.{layer}.attn", "blocks/attn"
    out = linear_rows(f"{of}/out", f"{attn}.proj")
    if attention == "softmax":
        return (*packed(of, ("query", "key", "value"), f"{attn}.qkv"), *out)
    channels = "head_dim" if filters == "shared" else "(head head_dim)"
    return (
        *packed(of, ("query",), f"{attn}.q"),
        *packed(of, ("key", "value"), f"{attn}.kv"),
        (f"{of}/depthwise/kernel", f"{attn}.dwc.weight", f"{channels} 1 filter_row filter_col"),
        (f"{of}/depthwise/bias", f"{attn}.dwc.bias", channels),
        (f"{of}/scale", f"{attn}.scale", "1 1 (head head_dim)"),
        *out,
    )


def fair(cfg: DitConfig) -> Layout:
    """Make the layout of facebookresearch/DiT; with linear attention, of LiT's release."""
    return Layout(
        name="fair",
        rows=(
            ("patch/project/kernel", "x_embedder.proj.weight", PATCH),
            ("patch/project/bias", "x_embedder.proj.bias"),
            *linear_rows("time/up", "t_embedder.mlp.0"),
            *linear_rows("time/down", "t_embedder.mlp.2"),
            ("label/table", "y_embedder.embedding_table.weight", "label embed"),
            *linear_rows("modulation", "blocks.{layer}.adaLN_modulation.1"),
            *mixing(cfg.attention, cfg.filters),
            *linear_rows("blocks/mlp/up", "blocks.{layer}.mlp.fc1"),
            *linear_rows("blocks/mlp/down", "blocks.{layer}.mlp.fc2"),
            *linear_rows("final_modulation", "final_layer.adaLN_modulation.1"),
            *linear_rows("final", "final_layer.linear"),
        ),
        constant={"pos_embed": sincos(cfg.grid, cfg.grid, cfg.width).reshape(1, cfg.tokens, cfg.width)},
    )


DIFFUSERS = Layout(
    name="diffusers",
    rows=(
        ("patch/project/kernel", "pos_embed.proj.weight", PATCH),
        ("patch/project/bias", "pos_embed.proj.bias"),
        # Every block has a copy of the embedders.
        *linear_rows("time/up", "transformer_blocks.{layer}.norm1.emb.timestep_embedder.linear_1"),
        *linear_rows("time/down", "transformer_blocks.{layer}.norm1.emb.timestep_embedder.linear_2"),
        ("label/table", "transformer_blocks.{layer}.norm1.emb.class_embedder.embedding_table.weight", "label embed"),
        *linear_rows("modulation", "transformer_blocks.{layer}.norm1.linear"),
        *linear_rows("blocks/attn/query", "transformer_blocks.{layer}.attn1.to_q"),
        *linear_rows("blocks/attn/key", "transformer_blocks.{layer}.attn1.to_k"),
        *linear_rows("blocks/attn/value", "transformer_blocks.{layer}.attn1.to_v"),
        *linear_rows("blocks/attn/out", "transformer_blocks.{layer}.attn1.to_out.0"),
        *linear_rows("blocks/mlp/up", "transformer_blocks.{layer}.ff.net.0.proj"),
        *linear_rows("blocks/mlp/down", "transformer_blocks.{layer}.ff.net.2"),
        *linear_rows("final_modulation", "proj_out_1"),
        *linear_rows("final", "proj_out_2"),
    ),
    ignore=("pos_embed.pos_embed",),
    differs=(
        "diffusers trains embedders for each block, and a DiT has one set: only DiTs that were converted to diffusers"
        " are read"
    ),
)

"""Layouts of foreign ViT checkpoints: timm and DeiT, SWS and TLEG genes, google-research archives."""

from heirloom.common.surgery.layout import Layout
from heirloom.common.surgery.rows import PATCH, Rows, module, modules, packed
from heirloom.common.vit.model import VitConfig


def positions(cfg: VitConfig, key: str, batch: str = "1 ") -> Rows:
    """Positions of the learned tokens, then of the patches, in one table [1, token, embed]; batch: its first axis."""
    parts = [(f"{name}/cls_position", f"{batch}1 embed") for name in cfg.learned if cfg.positions != "patches"]
    parts += [("registers/position", f"{batch}register embed")] if cfg.registers and cfg.positions == "all" else []
    parts += [("position", f"{batch}(grid_row grid_col) embed")]
    return ((" + ".join(path for path, _ in parts), key, " + ".join(axes for _, axes in parts)),)


def stem(cfg: VitConfig, patch: str, cls: str, dist: str, position: str) -> Rows:
    return (
        ("patch/project/kernel", f"{patch}.weight", PATCH),
        ("patch/project/bias", f"{patch}.bias"),
        ("class_token/cls", cls, "1 1 embed"),
        ("distillation_token/cls", dist, "1 1 embed"),
        *positions(cfg, position),
    )


def _timm_blocks(cfg: VitConfig, prefix: str, suffix: str = "", *leaves: str) -> Rows:
    """The blocks in timm's names. leaves: the names of weight and bias."""
    names = {"attn_norm": "norm1", "attn/out": "attn.proj", "mlp_norm": "norm2", "mlp/down": "mlp.fc2"}
    names |= {"attn/query_norm": "attn.q_norm", "attn/key_norm": "attn.k_norm"}
    names |= {"attn/inner_norm": "attn.norm", "mlp/inner_norm": "mlp.norm"}
    rows = tuple(row for a, b in names.items() for row in module(f"blocks/{a}", f"{prefix}.{b}{suffix}", *leaves))
    up = ("blocks/mlp/gate", "blocks/mlp/up") if cfg.gated else ("blocks/mlp/up",)
    return (
        *rows,
        *packed(("blocks/attn/query", "blocks/attn/key", "blocks/attn/value"), f"{prefix}.attn.qkv{suffix}", *leaves),
        *packed(up, f"{prefix}.mlp.fc1{suffix}", *leaves),
        ("blocks/attn_scale/scale", f"{prefix}.ls1.gamma"),
        ("blocks/mlp_scale/scale", f"{prefix}.ls2.gamma"),
    )


def _timm_pool() -> Rows:
    """Attention pooling in timm's names."""
    names = {"attn/query": "q", "attn/out": "proj", "norm": "norm", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
    return (
        ("pool/latent", "attn_pool.latent", "1 1 embed"),
        *packed(("pool/memory/key", "pool/memory/value"), "attn_pool.kv"),
        *modules("pool", "attn_pool", names),
    )


def _timm(name: str, cfg: VitConfig, blocks: Rows) -> Layout:
    norm = "fc_norm" if cfg.pool == "mean_norm" else "norm"
    heads = (*module("head", "head"), *module("distillation_head", "head_dist"))
    front = stem(cfg, "patch_embed.proj", "cls_token", "dist_token", "pos_embed")
    registers = ("registers/register", "reg_token", "1 register embed")
    norms = (*module("pre_norm", "norm_pre"), *module("norm", norm))
    return Layout(name, (*front, registers, *blocks, *norms, *_timm_pool(), *heads))


def timm(cfg: VitConfig) -> Layout:
    """Layout of timm and of the files of facebookresearch/deit."""
    return _timm("timm", cfg, _timm_blocks(cfg, "blocks.{layer}"))


def sws(cfg: VitConfig) -> Layout:
    """Layout of the auxiliary net of AlphaXia/SWS: one instance of each module for each stage."""
    return _timm("sws", cfg, _timm_blocks(cfg, "blocks.block", ".instances.{layer}"))


def tleg(cfg: VitConfig) -> Layout:
    """Layout of the auxiliary net of AlphaXia/TLEG: a base and a slope of each tensor."""
    leaves = (f"{leaf}_{{layer:base|ilayer}}" for leaf in ("weight", "bias"))
    return _timm("tleg", cfg, _timm_blocks(cfg, "blocks.block", ".instances.0", *leaves))


def google(cfg: VitConfig) -> Layout:
    """Layout of the archives of google-research/vision_transformer: kernels untransposed, with an axis of heads."""
    block = "Transformer/encoderblock_{layer}"
    attention, mlp = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3"
    axes = dict.fromkeys(("query", "key", "value"), "embed head head_dim") | {"out": "head head_dim embed"}
    projections = [(f"blocks/attn/{p}/kernel", f"{attention}/{p}/kernel", order) for p, order in axes.items()]
    bias = dict.fromkeys(("query", "key", "value"), "head head_dim") | {"out": "embed"}
    biases = [(f"blocks/attn/{p}/bias", f"{attention}/{p}/bias", bias[p]) for p in axes]
    norms = {"blocks/attn_norm": f"{block}/LayerNorm_0", "blocks/mlp_norm": f"{block}/LayerNorm_2"}
    norms |= {"norm": "Transformer/encoder_norm"}
    return Layout(
        "google",
        (
            ("patch/project/kernel", "embedding/kernel", "patch_row patch_col channel embed"),
            ("patch/project/bias", "embedding/bias"),
            ("class_token/cls", "cls", "1 1 embed"),
            *positions(cfg, "Transformer/posembed_input/pos_embedding"),
            *projections,
            *biases,
            ("blocks/mlp/up/kernel", f"{mlp}/Dense_0/kernel", "embed hidden"),
            ("blocks/mlp/up/bias", f"{mlp}/Dense_0/bias"),
            ("blocks/mlp/down/kernel", f"{mlp}/Dense_1/kernel", "hidden embed"),
            ("blocks/mlp/down/bias", f"{mlp}/Dense_1/bias"),
            *((f"{ours}/{leaf}", f"{theirs}/{leaf}") for ours, theirs in norms.items() for leaf in ("scale", "bias")),
            ("head/kernel", "head/kernel", "embed class"),
            ("head/bias", "head/bias"),
        ),
    )

"""Rows of layouts for the modules that models share: linear layers, norms, packed projections, transformer blocks."""

from collections.abc import Mapping

Rows = tuple[tuple[str, ...], ...]
PATCH = "embed channel patch_row patch_col"


def module(ours: str, theirs: str, weight: str = "weight", bias: str = "bias") -> Rows:
    """Weight and bias of a linear layer, or of a norm, which has `norm` in its name."""
    own = "scale" if "norm" in ours.rpartition("/")[2] else "kernel"
    return ((f"{ours}/{own}", f"{theirs}.{weight}"), (f"{ours}/bias", f"{theirs}.{bias}"))


def modules(ours: str, theirs: str, names: Mapping[str, str]) -> Rows:
    """Weights and biases of several linear layers and norms. names: our name of each, and theirs."""
    return tuple(row for a, b in names.items() for row in module(f"{ours}/{a}", f"{theirs}.{b}"))


def packed(ours: tuple[str, ...], theirs: str, weight: str = "weight", bias: str = "bias") -> Rows:
    """Weight and bias of linear layers that share a tensor, rows in this order."""
    leaves = {"kernel": weight, "bias": bias}
    return tuple((" + ".join(f"{path}/{leaf}" for path in ours), f"{theirs}.{key}") for leaf, key in leaves.items())


def flax_blocks(ours: str, theirs: str, names: Mapping[str, str]) -> Rows:
    """Transformer blocks in transformers' Flax models, whose kernels read first. names: as of `modules`, in torch."""
    kernels = {f"attn/{name}": "embed (head head_dim)" for name in ("query", "key", "value")}
    kernels |= {"attn/out": "(head head_dim) embed", "mlp/up": "embed hidden", "mlp/down": "hidden embed"}
    rows: list[tuple[str, ...]] = []
    for a, b in names.items():
        path, key = f"{ours}/{a}", f"{theirs}/{b.replace('.', '/')}"
        weight = ("kernel", kernels[a]) if a in kernels else ("scale",)
        rows += [(f"{path}/{weight[0]}", f"{key}/{weight[0]}", *weight[1:]), (f"{path}/bias", f"{key}/bias")]
    return tuple(rows)

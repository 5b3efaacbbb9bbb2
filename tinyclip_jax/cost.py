"""Counts of parameters and multiply-accumulates of a CLIP."""

from heirloom.common.surgery.axes import Spec, select
from heirloom.common.surgery.report import attention_macs, count, kernel_macs
from heirloom.common.train.optim import is_statistic
from heirloom.common.vit.model import macs as vit_macs
from tinyclip_jax.model import ClipConfig
from tinyclip_jax.resnet import ResNetConfig, positions
from tinyclip_jax.vit import VitImageConfig


def parameters(spec: Spec) -> dict[str, int]:
    """Count parameters as published figures do: image, text without the token table, the token table, total.

    Running statistics are not counted.
    """
    spec = {path: leaf for path, leaf in spec.items() if not is_statistic(path)}
    table = count(spec, "text/token/table")
    image, text, total = (count(spec, pattern) for pattern in ("image/**", "text/**", "**"))
    return {"image": image, "text": text - table, "token_table": table, "total": total}


def macs(cfg: ClipConfig, spec: Spec) -> dict[str, int]:
    """Multiply-accumulates of one image and of one caption, including attention scores and values."""
    return {"image": _image_macs(cfg, spec), "text": _tower_macs(spec, "text", cfg.text.context, ())}


def _image_macs(cfg: ClipConfig, spec: Spec) -> int:
    c = cfg.image
    if isinstance(c, VitImageConfig):
        inside = {path.removeprefix("image/"): leaf for path, leaf in spec.items() if path.startswith("image/")}
        last = {path: inside.pop(path) for path in [*inside] if path.startswith("projection/")}
        return vit_macs(c, inside) + sum(leaf.count for path, leaf in last.items() if path.endswith("kernel"))
    if isinstance(c, ResNetConfig):
        counted = kernel_macs({path: spec[path] for path in select("image/**", spec)}, tuple(positions(c)))
        return sum(counted.values()) + attention_macs(spec["image/pool/query/kernel"], c.grid**2 + 1)
    return _tower_macs(spec, "image", c.tokens, (("image/patch/**", c.tokens - 1),))


def _tower_macs(spec: Spec, tower: str, tokens: int, others: tuple[tuple[str, int], ...]) -> int:
    """Of a transformer over `tokens`. others: further (path glob, positions)."""
    inside = {path: spec[path] for path in select(f"{tower}/**", spec)}
    uses = (*others, (f"{tower}/blocks/**", tokens))
    uses += ((f"{tower}/projection/**", 1),) if f"{tower}/projection/kernel" in spec else ()
    return sum(kernel_macs(inside, uses).values()) + attention_macs(spec[f"{tower}/blocks/attn/query/kernel"], tokens)


def total_macs(cfg: ClipConfig, spec: Spec) -> int:
    """Multiply-accumulates of one image and one caption together."""
    return sum(macs(cfg, spec).values())

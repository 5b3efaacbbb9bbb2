"""Other methods to initialise a ViT of another depth or size from a trained one, each as a plan over the same axes."""

from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.surgery.maps import FRESH, Pick, even, first, pick
from heirloom.common.surgery.plan import Plan
from heirloom.common.vit.model import VitConfig
from learngene.expand import Head, expansion, grid_maps, layer_map, resized, unrolled_map

Method = Literal["expand", "shuffled", "every", "select", "heur", "auto", "stack", "interlace", "ligo"]
HEUR_LAYERS, AUTO_LAYERS = 3, 6  # blocks kept by Heur-LG and Auto-LG
ALPHA_QK, ALPHA_VO = (0.7, 0.7), (0.4, 0.4)  # mimetic initialisation: weight of the noise, weight of the identity


def shuffled(gene: VitConfig, student: VitConfig, head: Head) -> Plan:
    """Control: SWS's expansion with its stages in reverse order."""
    layers = unrolled_map(gene.layout) if student.layers == gene.depth else layer_map(student.layers, gene.layers)
    return expansion(gene, student, [gene.layers - 1 - stage for stage in layers], head)


def every(donor: VitConfig, student: VitConfig, head: Head) -> Plan:
    """Control: evenly spaced layers of an ordinary ViT; a deeper student repeats them in order."""
    deeper = student.layers > donor.layers
    rows = pick(layer_map(student.layers, donor.layers)) if deeper else even(donor.layers, student.layers)
    return resized(donor, student, rows, head)


def select(donor: VitConfig, student: VitConfig, head: Head) -> Plan:
    """Weight selection (Xu et al., ICLR 2024): the first layers, and evenly spaced rows of each axis; never the head.

    Deviation: the release selects from the packed rows of q, k and v at once, which mixes them up where the widths do
    not divide; here each is selected separately. Raises InputError when the donor is smaller.
    """
    for name in ("layers", "width", "hidden"):
        if getattr(student, name) > getattr(donor, name):
            sizes = f"{getattr(student, name)}, the donor's {getattr(donor, name)}"
            raise InputError(f"the student's {name} is {sizes}: set it to at most the donor's")
    plain(donor, student, "weight selection")
    width = evenly(donor.width, student.width)
    inner = {"head head_dim": width, "hidden": evenly(donor.hidden, student.hidden)}
    return Plan(
        (
            ("**head/*", FRESH),
            ("position", {"embed": width, **grid_maps(donor, student)}),
            ("blocks/**", {"layer": first(student.layers), "embed": width, **inner}),
            ("**", {"embed": width}),
        )
    )


def plain(donor: VitConfig, student: VitConfig, method: str) -> None:
    """Raises InputError for models with options, for a method whose maps are those of DeiT's ViT alone."""
    for whose, cfg in (("donor", donor), ("student", student)):
        options = cfg.options | ({"pool": cfg.pool} if cfg.pool in ("map", "cls+mean") else {})
        if options:
            name, value = next(iter(options.items()))
            raise InputError(f"the {whose}'s {name} is {value!r}, which {method} cannot carry: use expand or stack")


def evenly(source: int, target: int) -> Pick:
    """Rows of weight selection: multiples of source / target if it is whole, else rounded, half to even."""
    return pick(range(0, source, source // target)) if source % target == 0 else even(source, target)


def heur(donor: VitConfig, student: VitConfig, head: Head) -> Plan:
    """Heur-LG (Vanilla-LG): the donor's last three blocks on top of fresh ones; nothing else is inherited."""
    kept = _at_most(donor, student, HEUR_LAYERS)
    return _blocks(donor, student, pick([*[-1] * (student.layers - kept), *range(donor.layers - kept, donor.layers)]))


def auto(donor: VitConfig, student: VitConfig, head: Head) -> Plan:
    """Auto-LG: the donor's first six blocks, fresh ones above; nothing else is inherited."""
    kept = _at_most(donor, student, AUTO_LAYERS)
    return _blocks(donor, student, pick([*range(kept), *[-1] * (student.layers - kept)]))


def _at_most(donor: VitConfig, student: VitConfig, blocks: int) -> int:
    return min(blocks, donor.layers, student.layers)


def _blocks(donor: VitConfig, student: VitConfig, layer: Pick) -> Plan:
    blocks = resized(donor, student, layer, "fresh").rules[1]
    return Plan((blocks, ("**", FRESH)))


def stack(donor: VitConfig, student: VitConfig, head: Head) -> Plan:
    """StackBERT: all layers of the donor in order, repeated from the first."""
    return resized(donor, student, pick([layer % donor.layers for layer in range(student.layers)]), head)


def interlace(donor: VitConfig, student: VitConfig, head: Head) -> Plan:
    """Each layer of the donor twice in a row. Raises InputError for more than twice its depth."""
    if student.layers > 2 * donor.layers:
        most = f"interlacing {donor.layers} gives at most {2 * donor.layers}"
        raise InputError(f"the student has {student.layers} layers, and {most}: set student.layers to it")
    return resized(donor, student, pick([layer // 2 for layer in range(student.layers)]), head)


METHODS: dict[str, Callable[[VitConfig, VitConfig, Head], Plan]] = {
    "expand": lambda gene, student, head: expansion(gene, student, (), head),
    "shuffled": shuffled,
    "every": every,
    "select": select,
    "heur": heur,
    "auto": auto,
    "stack": stack,
    "interlace": interlace,
}


def plan(
    method: str, donor: VitConfig, student: VitConfig, layers: tuple[int, ...] = (), head: Head = "inherit"
) -> Plan:
    """Plan of a method by name. Raises InputError when donor and method do not fit together."""
    if method == "expand":
        return expansion(donor, student, layers, head)
    if student.gene != "none":
        raise InputError(f"{method!r} makes an ordinary ViT, and the student is a gene: set student.gene to 'none'")
    if layers:
        raise InputError(f"method is {method!r}, and only 'expand' takes a map of layers: leave layers empty")
    if method != "shuffled" and donor.gene != "none":
        raise InputError(f"{method!r} starts from an ordinary ViT, and the donor is a gene: use 'expand'")
    return METHODS[method](donor, student, head)


def mimetic(cfg: VitConfig, key: jax.Array) -> dict[str, np.ndarray]:
    """Mimetic initialisation (Trockman and Kolter 2023, after structured_init): the attention kernels of every block.

    Per head Q K^T resembles 0.7 Z + 0.7 I, and V times the projection 0.4 Z - 0.4 I, Z noise of variance 1 / width.
    Needs no donor.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    width, heads, dim = cfg.width, cfg.heads, cfg.head_dim
    out = {name: np.empty((cfg.layers, *shape), np.float32) for name, shape in _kernels(width, heads, dim).items()}
    for layer in range(cfg.layers):
        for head in range(heads):
            u, v = _factors(rng, width, *ALPHA_QK, sign=1)
            out["blocks/attn/query/kernel"][layer, :, head] = u[:, :dim]
            out["blocks/attn/key/kernel"][layer, :, head] = v[:, :dim]
        u, v = _factors(rng, width, *ALPHA_VO, sign=-1)
        out["blocks/attn/value/kernel"][layer] = u.reshape(width, heads, dim)
        out["blocks/attn/out/kernel"][layer] = v.T.reshape(heads, dim, width)
    return out


def _kernels(width: int, heads: int, dim: int) -> dict[str, tuple[int, ...]]:
    read = {f"blocks/attn/{name}/kernel": (width, heads, dim) for name in ("query", "key", "value")}
    return {**read, "blocks/attn/out/kernel": (heads, dim, width)}


def _factors(
    rng: np.random.Generator, width: int, noise: float, identity: float, sign: int
) -> tuple[np.ndarray, np.ndarray]:
    """u, v with u v^T = noise Z + sign identity I, columns by falling singular value."""
    z = rng.uniform(-1, 1, (width, width)) * (3 / width) ** 0.5
    u, s, vt = np.linalg.svd(noise * z + sign * identity * np.eye(width))
    return u * np.sqrt(s), vt.T * np.sqrt(s)

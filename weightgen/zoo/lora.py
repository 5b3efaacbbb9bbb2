"""Low-rank adapters in a checkpoint: pairs of tensors, in several libraries' names, and their canonical form.

An adapter is a product B A; (B R, R^-1 A) is the same adapter for every invertible R. A generator would see an
arbitrary basis, so adapters are brought to one form first, with their scale (alpha / rank) inside: rows of a zoo are
the updates that are really made.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from heirloom.common.errors import InputError
from weightgen.zoo.foreign import listed

# peft: m.lora_A.weight, m.lora_A.NAME.weight, m.lora_embedding_A; kohya: m.lora_down.weight; diffusers:
# m.lora.down.weight, m_lora.down.weight, m.lora_linear_layer.down.weight; loralib: m.lora_A; torchtune: m.lora_a.weight
# (MLX's m.lora_a is the transpose); XLabs: m_lora1.down.weight, of module m_lora1
NAME = re.compile(
    r"^(?P<module>.+?)(?P<mark>\.lora_embedding_|\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.|"
    r"(?<=_lora\d)\.(?=(?:down|up)\.weight$))(?P<side>[AB]|[ab](?=\.weight$)|down|up)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?P<end>\.weight)?$"
)
DOWN = ("A", "a", "down")
OTHERS = {  # what else such files hold, and cannot be read as a product B A
    "DoRA, which has magnitude vectors,": r"lora_magnitude_vector|dora_scale",
    "LoHa": r"\.hada_w",
    "LoKr": r"\.lokr_w",
    "LoCon in CP form": r"\.lora_mid\.",
    "AdaLoRA": r"\.lora_E(\.|$)|\.ranknum",
    "OFT": r"\.b?oft_",
    "IA3": r"\.ia3_l",
    "VeRA": r"\.vera_lambda",
    "trained tokens (trainable_token_indices)": r"trainable_tokens_delta",
    "LoRA with biases (lora_bias)": r"\.lora_(A|B|down|up)(\.[^.]+)?\.bias$",
    "a form that is not known here": r"(^|[._])lora(\d|[._]|$)",
}
Scale = Callable[[str, int], float]
"""`scale(module, rank)`: what B A of a module is multiplied by."""


@dataclass(frozen=True)
class Adapter:
    """One low-rank pair. down: [rank, in] (A); up: [out, rank] (B); the update of the weight is up @ down."""

    down: np.ndarray
    up: np.ndarray


@dataclass(frozen=True)
class Pair:
    """A module's two tensors, and their names without the adapter's. Convolution axes may be at their end."""

    module: str
    down: str
    up: str
    adapter: Adapter


def canon(adapter: Adapter, scale: float = 1.0) -> Adapter:
    """Compute the canonical form, the singular value decomposition of scale B A, without the product [out, in].

    Both sides get the roots of the singular values, in falling order; of each direction the largest entry of its left
    vector is positive. A rank above `out` or `in` is kept, its surplus zeros. In f32, or f64 where `up` is.
    """
    out_basis, out_mix = np.linalg.qr(scale * adapter.up.astype(np.float64))
    in_basis, in_mix = np.linalg.qr(adapter.down.astype(np.float64).T)
    left, values, right = np.linalg.svd(out_mix @ in_mix.T, full_matrices=False)
    left, right = out_basis @ left, right @ in_basis.T
    sign = np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])])
    root = np.sqrt(values)
    surplus = len(adapter.down) - len(values)
    dtype = np.float64 if adapter.up.dtype == np.float64 else np.float32
    down = np.pad((sign * root)[:, None] * right, ((0, surplus), (0, 0)))
    up = np.pad(left * sign * root, ((0, 0), (0, surplus)))
    return Adapter(down.astype(dtype), up.astype(dtype))


def has_adapters(tensors: Mapping[str, np.ndarray]) -> bool:
    """Tell whether names in a checkpoint are those of adapters of any kind."""
    return any(NAME.match(key) or any(re.search(mark, key) for mark in OTHERS.values()) for key in tensors)


def pairs(tensors: Mapping[str, np.ndarray]) -> dict[str, Pair]:
    """Find the pairs of a checkpoint by module.

    Raises InputError when there are none, a half is missing, two adapters are in one file, the halves do not fit
    together, or there are tensors of another kind of adapter.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    names: set[str] = set()
    with_pair = {hit["module"] for key in tensors if (hit := NAME.match(key))}
    for key in tensors:
        if hit := NAME.match(key):
            side = "down" if hit["side"] in DOWN else "up"
            if side in (halves := found.setdefault((hit["module"], hit["mark"]), {})):
                raise InputError(f"{hit['module']} has two adapters, {halves[side]} and {key}: keep one in a file")
            halves[side] = key
            names |= {hit["adapter"]} - {None, "default"}
        elif key.removesuffix(".alpha") in with_pair:
            continue
        elif kind := next((kind for kind, mark in OTHERS.items() if re.search(mark, key)), None):
            plain = "only pairs B A can be generated; merge it into its base model"
            raise InputError(f"{key} is of {kind} and no plain LoRA: {plain}")
    if not found:
        pairs = ".lora_A.weight and .lora_B.weight, or .lora_down.weight and .lora_up.weight"
        raise InputError(f"no adapters here: names must end in {pairs}")
    if len(names) > 1:
        raise InputError(f"there are several adapters, {listed(sorted(names))}: keep one in a file")
    out: dict[str, Pair] = {}
    for (module, _), halves in found.items():
        if len(halves) == 1:
            only = _plain(min(halves.values())).removeprefix(module)[1:]
            raise InputError(f"{module} has only {only}: the other half is missing; save the adapter again")
        if module in out:
            raise InputError(f"{module} has pairs under two kinds of names: keep one")
        down, up = (np.asarray(tensors[halves[side]]) for side in ("down", "up"))
        _check(module, down, up)
        halved = dict(down=_plain(halves["down"]), up=_plain(halves["up"]))
        out[module] = Pair(module=module, **halved, adapter=Adapter(down, up))
    return out


def _plain(key: str) -> str:
    """Remove the name of the adapter from a tensor's name."""
    hit = NAME.match(key)
    return key if hit is None else "".join((hit["module"], hit["mark"], hit["side"], hit["end"] or ""))


def _check(module: str, down: np.ndarray, up: np.ndarray) -> None:
    if not down.size or not up.size:
        shapes = f"shapes {down.shape} and {up.shape}"
        raise InputError(f"{module}: its adapter has no numbers ({shapes}); gather it (ZeRO-3) before saving")
    if down.dtype.kind in "iub" or up.dtype.kind in "iub":
        raise InputError(f"{module}: its adapter is {down.dtype}: it is quantised; take the original")
    if down.ndim < 2 or up.ndim != down.ndim or set(up.shape[2:]) > {1} or len(down) != up.shape[1]:
        pair = "[rank, in] and [out, rank] (of a convolution [rank, in, k, k] and [out, rank, 1, 1])"
        merged = "merged or grouped adapters cannot be generated"
        raise InputError(f"{module}: A {down.shape} and B {up.shape} are no pair {pair}: {merged}")


def alphas(tensors: Mapping[str, np.ndarray], modules: Mapping[str, Pair]) -> dict[str, float]:
    """Read `alpha` by module, where a file keeps it as a number next to the pair (kohya)."""
    found = {}
    for module in modules:
        if (value := tensors.get(f"{module}.alpha")) is not None:
            if np.size(value) != 1 or not np.isfinite(np.asarray(value, np.float64)).all():
                raise InputError(f"{module}.alpha is no number: save the adapter again")
            found[module] = float(np.asarray(value, np.float64).reshape(()))
    return found


def canonical_tensors(
    tensors: Mapping[str, np.ndarray], scale: Scale = lambda module, rank: 1.0
) -> dict[str, np.ndarray]:
    """Bring a checkpoint's pairs into canonical form, scale inside; alphas are left out, other tensors unchanged."""
    modules = pairs(tensors)
    gone = {f"{module}.alpha" for module in modules}
    fixed: dict[str, np.ndarray] = {}
    for module, pair in modules.items():
        down, up = pair.adapter.down, pair.adapter.up
        flat = Adapter(down.reshape(len(down), -1), up.reshape(len(up), -1))
        one = canon(flat, scale(module, len(down)))
        fixed |= {pair.down: one.down.reshape(down.shape), pair.up: one.up.reshape(up.shape)}
    return {_plain(key): fixed.get(_plain(key), value) for key, value in tensors.items() if key not in gone}


Layout = Literal["peft", "named", "alpha"]
"""How generated adapters are written. peft: adapter_config.json and adapter_model.safetensors; named: the members' own
names, scale 1; alpha: these with an `.alpha` equal to the rank for every module, which is scale 1 too.
"""


def layout_of(tensors: Mapping[str, np.ndarray], configured: bool) -> Layout:
    """Choose the layout that fits the names of the members. configured: they had an adapter_config.json."""
    hits = [hit for key in tensors if (hit := NAME.match(key))]
    if configured or all(hit["module"].startswith("base_model.model.") for hit in hits):
        return "peft"
    return "alpha" if any(hit["side"] in ("down", "up") for hit in hits) else "named"

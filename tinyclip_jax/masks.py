"""Learned masks: automatic weight inheritance (TinyCLIP §3.2; l0module.py; hard-concrete gates, arXiv 1712.01312).

Every channel of a tower's residual stream, every head and every hidden unit has a gate between 0 and 1 with a trained
log-alpha. A masked model is the same model with its kernels scaled by the gates (`apply_gates`); its norms use the open
channels only (`Keep`). A constraint on the expected size closes gates; `tinyclip_jax.inherit.prune` then removes the
closed rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import log
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.functional import Functional
from heirloom.common.surgery.axes import Axes, Leaf, Spec, matches
from tinyclip_jax.model import ClipConfig, ImageConfig, Keep, TextConfig
from tinyclip_jax.vit import VitImageConfig

LOW, HIGH = -0.1, 1.1  # the sigmoid is stretched to this and clipped to 0..1, so that a gate can be exactly 0 or 1
TEMPERATURE = 2 / 3
EPS = 1e-6
MAGIC = 0.8  # the release's name: a deterministic gate is sigmoid(log_alpha * MAGIC / TEMPERATURE)
OPEN, CLOSED = 10.0, -10.0  # log-alpha before the first step
LIMIT = log(100)  # log-alpha stays within +-LIMIT from the first step on
MULTIPLIER = 10.0  # both multipliers of the constraint before the first step

TOWERS = ("image", "text")
GATES = {"embed": "embed", "head": "layer head", "hidden": "layer hidden"}
MULTIPLIERS = ("linear", "quadratic")
PATTERN = "masks/**"
_RESNET = "a ResNet, and learned masks need a ViT"


@dataclass(frozen=True)
class MaskConfig:
    """The mask phase of automatic inheritance; the defaults are those of script/auto_*.sh of the release."""

    prune_step: int = 0
    """Steps with masks; then the model is pruned to the open gates. 0: no masks."""
    start: float = 0.0
    """Target sparsity at the first step: share of the parameters to remove (0.25 for a stage that continues from a 75 %
    model).
    """
    target: float = 0.25
    """Target sparsity at the end of the warm-up."""
    warmup: int = 1000
    """Steps in which the target sparsity rises from `start` to `target`."""
    lr: float = 0.02
    """Learning rate of the masks (down) and of the multipliers of the constraint (up)."""
    momentum: float = 0.9
    """First beta of their Adam. Use 0 for phases of a hundred steps: with momentum, gates go on closing for ten steps
    too many.
    """
    round_to: int = 1
    """Widths and hidden units are rounded up to a multiple: 8, 64, 128 fill the lanes of a TPU. Deviation: the release
    has 1.
    """
    legacy_proj_scale: bool = False
    """As the release: scale the final projections by the mask when pruning, though the masked model does not."""
    legacy_drop_bias: bool = False
    """As the release: drop the output bias of a layer that lost all heads, though the masked model adds it."""

    def __post_init__(self) -> None:
        between(self, "prune_step", "warmup", "lr")
        between(self, "start", "target", "momentum", below=1.0)
        positive(self, "round_to")

    def idle(self) -> dict[str, str]:
        """Fields that have no effect, and why."""
        others = (one.name for one in fields(self) if one.name != "prune_step" and not self.prune_step)
        return dict.fromkeys(others, "it has no masks; set --masks.prune_step, too")

    def target_at(self, step: Array | int) -> Array:
        """Target sparsity at `step`."""
        return self.start + (self.target - self.start) * jnp.minimum(1.0, step / max(self.warmup, 1))


EXACT = MaskConfig()


def open_probability(log_alpha: Float[ArrayLike, "*gates"]) -> Float[Array, "*gates"]:
    """Probability that a gate is not 0 (cdf_qz of the release)."""
    closed = jax.nn.sigmoid(TEMPERATURE * log(-LOW / HIGH) - jnp.asarray(log_alpha, jnp.float32))
    return 1 - jnp.clip(closed, EPS, 1 - EPS)


def sample_gate(log_alpha: Float[ArrayLike, "*gates"], uniform: Float[ArrayLike, "*gates"]) -> Float[Array, "*gates"]:
    """Training gate in [0, 1] from a draw of U(0, 1)."""
    noise = jnp.log(uniform) - jnp.log1p(-jnp.asarray(uniform))
    concrete = jax.nn.sigmoid((noise + log_alpha) / TEMPERATURE)
    return jnp.clip(concrete * (HIGH - LOW) + LOW, 0, 1)


def sample_gates(key: Array, masks: Mapping[str, Array]) -> dict[str, Array]:
    """Training gates of one step from the log-alphas, by path.

    Deviation: one draw for the whole batch; in the release every process draws its own.
    """
    paths = [path for path in sorted(masks) if _is_gate(path)]
    keys = jax.random.split(key, len(paths))
    return {
        path: sample_gate(masks[path], jax.random.uniform(k, masks[path].shape, minval=EPS, maxval=1 - EPS))
        for path, k in zip(paths, keys, strict=True)
    }


def deterministic_gate(
    log_alpha: Float[ArrayLike, "*rows units"], round_to: int = 1
) -> Float[np.ndarray, "*rows units"]:
    """Gates for evaluation and pruning, float32: each row's smallest are 0, as many as are expected closed.

    The other gates keep their soft value, sigmoid(1.2 log_alpha); they are not set to 1.
    """
    soft = np.array(jax.nn.sigmoid(jnp.asarray(log_alpha, jnp.float32) * (MAGIC / TEMPERATURE)))
    expected = np.asarray(open_probability(log_alpha), np.float64).sum(-1)
    rows, size = soft.reshape(-1, soft.shape[-1]), soft.shape[-1]
    for row, kept in zip(rows, np.atleast_1d(expected).ravel(), strict=True):
        zeros = round(size - float(kept))  # half to even, as the release
        zeros = max(size - -(-(size - zeros) // round_to) * round_to, 0)
        row[np.argsort(row, kind="stable")[:zeros]] = 0
    return rows.reshape(soft.shape)


def deterministic_gates(masks: Mapping[str, Any], round_to: int = 1) -> dict[str, np.ndarray]:
    """Gates for evaluation and pruning of all log-alphas, by path; heads are never rounded.

    Raises InputError when a tower has no open channel.
    """
    open_gates = {path: value for path, value in masks.items() if _is_gate(path)}
    gates = {p: deterministic_gate(x, 1 if p.endswith("/head") else round_to) for p, x in open_gates.items()}
    for path, value in gates.items():
        if path.endswith("/embed") and not value.any():
            needed = "a tower needs one or more: lower masks.target, or raise masks.prune_step"
            raise InputError(f"{path}: every channel is closed, {needed}")
    return gates


def mask_spec(cfg: ClipConfig) -> Spec:
    """The trained leaves next to the weights: log-alphas and, per tower, the two multipliers of the constraint."""
    spec = {}
    for tower in TOWERS:
        c, (heads, hidden) = tower_of(cfg, tower), _full(cfg, tower)
        sizes = dict(embed=c.width, layer=c.layers, head=heads, hidden=hidden)
        for name, axes in GATES.items():
            parsed = Axes.parse(axes)
            shape = tuple(sizes[axis] for axis in parsed.names)
            spec[f"masks/{tower}/{name}"] = Leaf(parsed, shape, np.dtype(np.float32))
        spec |= {f"masks/{tower}/{name}": Leaf(Axes.parse(""), (), np.dtype(np.float32)) for name in MULTIPLIERS}
    return spec


def initial_masks(donor: ClipConfig, cfg: ClipConfig) -> dict[str, np.ndarray]:
    """Log-alphas before the first step: open, or closed for rows the donor lost earlier (load_pruned_model)."""
    masks = {
        path: np.full(leaf.shape, OPEN if _is_gate(path) else MULTIPLIER, np.float32)
        for path, leaf in mask_spec(cfg).items()
    }
    for tower in TOWERS:
        before, now = tower_of(donor, tower), tower_of(cfg, tower)
        masks[f"masks/{tower}/embed"][before.width :] = CLOSED
        for name, sizes in (("head", before.heads), ("hidden", before.hidden)):
            for row, size in zip(masks[f"masks/{tower}/{name}"], per_layer(sizes, now.layers), strict=True):
                row[size:] = CLOSED
    return masks


def clip_log_alphas(params: Mapping[str, Any]) -> dict[str, Any]:
    """Clip the log-alphas to [ln 0.01, ln 100], after each update."""
    return {path: jnp.clip(value, -LIMIT, LIMIT) if _is_gate(path) else value for path, value in params.items()}


def prunable(cfg: ClipConfig, tower: str) -> int:
    """Number of parameters masks can remove: projections and MLPs, not embeddings, norms, joint projection."""
    c, heads, hidden = tower_of(cfg, tower), *_full(cfg, tower)
    per_head = (4 * c.width**2 + 4 * c.width) // heads
    return c.layers * (per_head * heads + 2 * c.width * hidden + c.width + hidden)


def remaining(cfg: ClipConfig, tower: str, masks: Mapping[str, Any]) -> Float[Array, ""]:
    """Expected number of prunable parameters that remain."""
    c, (heads, _) = tower_of(cfg, tower), _full(cfg, tower)
    per_head = (4 * c.width**2 + 4 * c.width) // heads
    embed, head, hidden = (jnp.sum(open_probability(masks[f"masks/{tower}/{name}"])) for name in GATES)
    return embed * head * per_head / c.width + 2 * embed * hidden


def sparsity(cfg: ClipConfig, masks: Mapping[str, Any]) -> Float[Array, ""]:
    """Expected share of the prunable parameters of both towers that is removed."""
    left = jnp.sum(jnp.stack([remaining(cfg, tower, masks) for tower in TOWERS]))
    return 1 - left / sum(prunable(cfg, tower) for tower in TOWERS)


def constraint(
    removed: Float[ArrayLike, ""], target: Float[ArrayLike, ""], masks: Mapping[str, Any]
) -> Float[Array, ""]:
    """Penalty l1 d + l2 d^2 below the target sparsity, d = max(target - removed, 0); multipliers ascend on it.

    removed: `sparsity`. target: `MaskConfig.target_at`.

    Deviation from the paper, as in the released code: never a penalty for pruning too much.
    """
    linear, quadratic = (sum(masks[f"masks/{t}/{name}"] for t in TOWERS) / len(TOWERS) for name in MULTIPLIERS)
    short = jnp.maximum(jnp.subtract(target, removed), 0)
    return linear * short + quadratic * short**2


def apply_gates(params: Mapping[str, Any], spec: Spec, gates: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the masked model, which are the same as masked activations.

    Kernels that write to the residual stream are multiplied by its gates, kernels that read heads or hidden units by
    theirs.
    """
    out = {}
    for path, leaf in spec.items():
        value = params[path]
        for i, name in enumerate(leaf.axes.names):
            side = leaf.axes.sides[i]
            if (name, side) not in (("embed", "write"), ("head", "read"), ("hidden", "read")):
                continue
            shape = [1] * len(leaf.shape)
            shape[i] = leaf.shape[i]
            if name != "embed":
                shape[0] = leaf.shape[0]
            value = (value * gates[f"masks/{path.split('/')[0]}/{name}"].reshape(shape)).astype(value.dtype)
        out[path] = value
    return out


@dataclass(frozen=True, eq=False)
class Masked:
    """A CLIP with learned masks, as `Functional`; its parameters are weights and masks in one dictionary."""

    model: Functional
    cfg: ClipConfig

    @property
    def spec(self) -> Spec:
        return self.model.spec | mask_spec(self.cfg)

    def init(
        self, key: Array, paths: Iterable[str] | None = None, place: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Initial weights, and masks with all gates open."""
        params = self.model.init(key, place=place) | initial_masks(self.cfg, self.cfg)
        return params if paths is None else {path: params[path] for path in paths}

    def apply(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        weights, keep = self._masked(params)
        return self.model.apply(weights, *args, keep=keep, **kwargs)

    def train(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        weights, keep = self._masked(params)
        return self.model.train(weights, *args, keep=keep, **kwargs)

    def _masked(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], Keep]:
        weights, gates = split(params)
        keep = Keep(*(gates[f"masks/{tower}/embed"] != 0 for tower in TOWERS))
        return apply_gates(weights, self.model.spec, gates), keep


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into weights and masks."""
    masks = {path: value for path, value in params.items() if matches(PATTERN, path)}
    return {path: value for path, value in params.items() if path not in masks}, masks


def per_layer(size: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
    """The size of each layer, from one number for all or a tuple."""
    return size if isinstance(size, tuple) else (size,) * layers


def _is_gate(path: str) -> bool:
    return path.startswith("masks/") and path.rsplit("/", 1)[1] in GATES


def tower_of(cfg: ClipConfig, tower: str) -> ImageConfig | TextConfig:
    """Config of the tower "image" or "text". Raises InputError for a ResNet and for timm's ViT."""
    if not isinstance(cfg.image, ImageConfig):
        manual = "set masks.prune_step to 0 for manual inheritance"
        kind = "timm's ViT, and learned masks need CLIP's own" if isinstance(cfg.image, VitImageConfig) else _RESNET
        raise InputError(f"the image tower is {kind}: {manual}")
    if cfg.text.projection == "none":
        raise InputError("text.projection is 'none', and learned masks change the width before it: set it to 'linear'")
    return cfg.image if tower == "image" else cfg.text


def _full(cfg: ClipConfig, tower: str) -> tuple[int, int]:
    """Heads and hidden units of every layer. Raises InputError when layers differ: masks need an unpruned model."""
    c = tower_of(cfg, tower)
    if isinstance(c.heads, tuple) or isinstance(c.hidden, tuple):
        what = f"set student.{tower}.heads and student.{tower}.hidden to one number each"
        raise InputError(f"student.{tower} has unequal layers, and masks need the original model: {what}")
    return c.heads, c.hidden


__all__ = [
    "MaskConfig",
    "Masked",
    "constraint",
    "deterministic_gate",
    "open_probability",
    "prunable",
    "remaining",
    "sample_gate",
    "sample_gates",
    "sparsity",
]

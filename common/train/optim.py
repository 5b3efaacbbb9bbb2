"""AdamW as the papers use it, Muon or CAME; warm-up and cosine; weight decay of every parameter by its role."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from heirloom.common.errors import InputError, between, nearest
from heirloom.common.surgery.axes import Leaf, Spec, matches, select
from heirloom.common.train.came import scale_by_came

# The role of a parameter is the last part of its path. Decay by number of dimensions would go wrong here: heads are
# split into axes of their own and layers are stacked, so a bias may have three.
DECAYED = frozenset({"kernel", "table", "final_table", "position", "cls_position"})
NOT_DECAYED = frozenset({"bias", "scale", "cls", "register", "latent", "logit_scale", "logit_bias"})
STATISTICS = frozenset({"mean", "variance"})  # of batch norms: the step writes them, not the optimizer


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. The defaults are TinyCLIP's (train.py and script/*.sh of the release)."""

    algorithm: Literal["adamw", "muon", "came"] = "adamw"
    """Muon orthogonalises the update of each layer's kernels, at the size of Adam's updates (arXiv:2502.16982); the
    rest is NAdam's. CAME factors the second moment and has b3 (arXiv:2307.02047; PixArt-Σ); eps is its own.
    """
    lr: float = 1e-4
    """Peak learning rate."""
    warmup: int = 2000
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: a half cosine to 0 at the last step, or nothing."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.98
    """Decay of the second moment."""
    b3: float = 0.9999
    """Decay of the squared deviations of CAME's updates; the others have none."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.2
    """Decoupled decay of kernels and tables, times the learning rate."""
    decay: tuple[str, ...] = ()
    """Path patterns of further parameters to decay."""
    no_decay: tuple[str, ...] = ()
    """Path patterns of further parameters to spare; they win over `decay`."""
    frozen: tuple[str, ...] = ()
    """Path patterns of parameters that are never updated."""
    clip: float | None = 5.0
    """Greatest L2 norm of the gradient, over all trained parameters together."""

    def __post_init__(self) -> None:
        between(self, "lr", "warmup", "eps", "weight_decay", "clip")
        between(self, "b1", "b2", "b3", below=1.0)
        if self.clip == 0:
            raise InputError("clip is 0, which makes every gradient 0: set it to None to clip none")

    def idle(self) -> dict[str, str]:
        """Fields that have no effect, and why."""
        return {"eps": "CAME has its own"} if self.algorithm == "came" else {"b3": "only CAME has it"}


def learning_rate(cfg: OptimConfig, total: int) -> optax.Schedule:
    """The rate of update `step` = 0, 1, ...: `lr (step + 1) / warmup`, then a half cosine that ends at `total`.

    Raises InputError when the warm-up is longer than the run.
    """
    if total < 1:
        raise InputError(f"a run of {total} steps: set steps to 1 or more")
    if cfg.warmup > total:
        set_to = f"set optim.warmup to {total // 10}, say"
        raise InputError(f"a warm-up of {cfg.warmup} steps does not fit in {total} steps: {set_to}")

    def rate(step: Any) -> jax.Array:
        rising = cfg.lr * (step + 1) / max(cfg.warmup, 1)
        falling: jax.typing.ArrayLike = cfg.lr
        if cfg.schedule == "cosine":
            # (1 + cos(pi x)) / 2 = sin(pi (1 - x) / 2)^2: without the cancellation that makes the last steps 0 in f32
            left = jnp.maximum(total - step, 0) / max(total - cfg.warmup, 1)
            falling = cfg.lr * jnp.sin(math.pi / 2 * left) ** 2
        return jnp.where(step < cfg.warmup, rising, falling)

    return rate


def make_optimizer(cfg: OptimConfig, spec: Spec, total: int) -> optax.GradientTransformation:
    """Clip, Adam, Muon or CAME, decay, learning rate; moments in f32, none for frozen parameters.

    The rate of the last update stays in the state as `learning_rate`, where the step's metrics find it.
    Raises InputError on a pattern that matches no parameter, and on a parameter of unknown role.
    """
    fixed = frozen_paths(cfg, spec)
    trained = optax.chain(
        optax.identity() if cfg.clip is None else optax.clip_by_global_norm(cfg.clip),
        _scale(cfg, spec),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed(cfg, spec)),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate(cfg, total)),
    )
    groups = {path: "frozen" if path in fixed else "followed" if is_statistic(path) else "trained" for path in spec}
    # Two parts: training states on disk have an empty pair here.
    followed = optax.chain(optax.identity(), optax.set_to_zero())
    return optax.partition({"trained": trained, "followed": followed, "frozen": optax.set_to_zero()}, groups)


def frozen_paths(cfg: OptimConfig, spec: Spec) -> set[str]:
    """The parameters that are never updated. Raises InputError on a pattern that matches none."""
    return {path for pattern in cfg.frozen for path in select(pattern, spec)}


def is_statistic(path: str) -> bool:
    """Whether a parameter is a running statistic, which follows the batches and is not trained."""
    return path.rpartition("/")[2] in STATISTICS


def _scale(cfg: OptimConfig, spec: Spec) -> optax.GradientTransformation:
    if cfg.algorithm == "adamw":
        return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=jnp.float32)
    if cfg.algorithm == "came":
        return scale_by_came(spec, cfg.b1, cfg.b2, cfg.b3)
    matrices = {path: _matrix(path, leaf) for path, leaf in spec.items()}
    # A rate of -1 undoes the sign: rate and decay follow for all parameters alike.
    muon: dict[str, Any] = dict(adam_b1=cfg.b1, adam_b2=cfg.b2, eps=cfg.eps, mu_dtype=jnp.float32, consistent_rms=0.2)
    return optax.contrib.muon(-1.0, **muon, muon_weight_dimension_numbers=matrices)


def _matrix(path: str, leaf: Leaf) -> optax.contrib.MuonDimensionNumbers | None:
    """A kernel as the matrix its layer multiplies by, from what it reads to what it writes, in any dimensions."""
    read, write = leaf.axes.where("read"), leaf.axes.where("write")
    if not (path.endswith("kernel") and read and write):
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=read, output_axis=write)


def decayed(cfg: OptimConfig, spec: Spec) -> dict[str, bool]:
    """For every path whether weight decay applies. Raises InputError as `make_optimizer` does."""
    for pattern in (*cfg.decay, *cfg.no_decay):
        select(pattern, spec)
    return {path: _decays(cfg, path) for path in spec}


def _decays(cfg: OptimConfig, path: str) -> bool:
    role = path.rpartition("/")[2]
    if any(matches(pattern, path) for pattern in cfg.no_decay):
        return False
    if any(matches(pattern, path) for pattern in cfg.decay):
        return True
    if role not in DECAYED | NOT_DECAYED | STATISTICS:
        hint = nearest(role, DECAYED | NOT_DECAYED)
        raise InputError(f"{path}: no weight decay for {role!r}{hint}; name it in optim.decay or optim.no_decay")
    return role in DECAYED

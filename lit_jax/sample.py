"""Samples a class-conditional model, with guidance; modulations by time and label are computed before the loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from heirloom.common.diffusion import Prediction, Sampler, Schedule, ddim, ddpm, dpm_solver, linear_schedule, respace
from heirloom.common.errors import FLOAT32_MAX, InputError, nearest, remark
from heirloom.common.mesh import batch_sharding, filled_rows, replicated
from heirloom.common.train.parts import Model
from lit_jax.dit import DitConfig, Modulation
from lit_jax.losses import split

Name = Literal["ddpm", "ddim", "dpm"]
Guided = Literal["all", "first three"]
PRECOMPUTE_LIMIT = 2**30  # bytes: above this, modulations are computed step by step, not before the loop


def is_number(value: Any, kind: type = Real) -> bool:
    """Returns whether a value from Python is a number of this kind that float32 can hold, numpy's too, and no bool."""
    right = isinstance(value, kind) and not isinstance(value, bool)
    return right and bool(abs(value) <= FLOAT32_MAX)


def check_whole(name: str, value: Any) -> None:
    """Raises InputError for what is no whole number from 1 on."""
    if not is_number(value, Integral) or value < 1:
        raise InputError(f"{name} is {value!r}: choose a whole number, 1 or more")


def check_choices(cfg: object, **choices: Any) -> None:
    """Checks that fields have one of their values. choices: the `Literal` of each. Raises InputError."""
    for name, literal in choices.items():
        known, value = get_args(literal), getattr(cfg, name)
        if value not in known:
            raise InputError(f"no {name} {value!r}{nearest(str(value), known)}; choose {', '.join(known)}")


def check_guidance(guidance: float) -> None:
    """Raises InputError for guidance below 0, and remarks what it does below 1."""
    if guidance < 0:
        raise InputError(f"guidance is {guidance:g}, which draws away from the class or prompt: give 1 (none) or more")
    if guidance < 1:
        remark(f"guidance is {guidance:g}: 0 ignores the class or prompt, 1 is no guidance, above 1 it counts more")


@dataclass(frozen=True)
class SampleConfig:
    """Settings of the sampler of models of classes."""

    sampler: Name = "ddpm"
    """Ancestral with the learned variance (the paper's numbers), DDIM, or DPM-Solver++(2M)."""
    steps: int = 250
    guidance: float = 1.0
    """Classifier-free guidance scale: 1 is none, 1.5 is the paper's, 4 gives good-looking pictures."""
    guided: Guided = "first three"
    """Channels of the noise that are guided; DiT's published numbers guide three of four latent channels."""

    def __post_init__(self) -> None:
        check_choices(self, sampler=Name, guided=Guided)
        if not is_number(self.guidance):
            raise InputError(f"guidance is {self.guidance!r}: give a number, such as 1.5 (1 is none)")
        object.__setattr__(self, "guidance", float(self.guidance))
        if is_number(self.steps, Integral):
            object.__setattr__(self, "steps", int(self.steps))
        check_guidance(self.guidance)

    def make(self) -> Sampler:
        """Make the sampler. Raises InputError for a number of steps that the chain of 1000 cannot be respaced to."""
        chain = linear_schedule()
        if not is_number(self.steps, Integral) or not 1 <= self.steps <= len(chain):
            raise InputError(f"--steps {self.steps} with {self.sampler}: choose between 1 and {len(chain)}")
        if self.steps == 1 and self.sampler == "ddpm":
            raise InputError("--steps 1 with ddpm returns noise: use 2 steps or more, or --sampler dpm")
        try:
            if self.sampler == "dpm":
                return self._dpm(chain)
            return (
                ddpm(respace(chain, self.steps))
                if self.sampler == "ddpm"
                else ddim(respace(chain, self.steps, "integer"))
            )
        except ValueError as error:
            raise InputError(f"--steps {self.steps} with {self.sampler}: {error}") from error

    def _dpm(self, chain: Schedule) -> Sampler:
        return dpm_solver(chain, self.steps)


@dataclass(frozen=True)
class ClassConfig(SampleConfig):
    """Settings of the sampler of models of classes, for pictures to look at."""

    guidance: float = 4.0
    """Classifier-free guidance scale: 1 is none, and the default of a model without an unconditional class."""
    guided: Guided = "all"
    """Channels of the noise that are guided; DiT's published numbers guide three of four latent channels."""


@dataclass(frozen=True)
class Draw:
    """The compiled sampler: `draw(params, labels, key)` returns pixels or scaled latents.

    A picture depends only on its key and its label, not on the rest of the batch or on the mesh.
    """

    cfg: DitConfig
    sampling: SampleConfig
    mesh: Mesh
    compiled: Callable[..., jax.Array]

    def check(self, labels: Int[np.ndarray, " n"] | Sequence[int]) -> None:
        """Raise InputError for a label that the model does not have."""
        cfg, labels = self.cfg, np.asarray(labels)
        none = f", and {cfg.classes} for no class" if cfg.null_class else ", and no null class"
        if len(wrong := labels[(labels < 0) | (labels >= cfg.rows)]):
            raise InputError(f"no class {wrong[0]}: this model has 0 to {cfg.classes - 1}{none}")

    def __call__(
        self, params: Mapping[str, Any], labels: Int[np.ndarray, " n"] | Sequence[int], key: Key[Array, "*n"]
    ) -> Float[Array, "n size size channel"]:
        """Draw a sample for each label. key: one for each, or a single one, into which the number of each is folded.

        Raises InputError for a label that the model does not have.
        """
        self.check(labels)
        labels = np.asarray(labels, np.int32)
        keys = picture_keys(key, np.arange(len(labels))) if key.ndim == 0 else key
        unique, which = np.unique(labels, return_inverse=True)
        if self.sampling.guidance != 1:
            unique = np.append(unique, self.cfg.classes).astype(np.int32)
        rows = filled_rows(len(labels), self.mesh)
        with jax.set_mesh(self.mesh):
            return self.compiled(params, unique, which[rows].astype(np.int32), keys[rows])[: len(labels)]


def picture_keys(key: Key[Array, ""], numbers: Int[np.ndarray, " n"]) -> Key[Array, " n"]:
    """Derive a key for each picture from one key and the pictures' numbers."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(numbers, jnp.uint32))


def drawer(model: Model, cfg: DitConfig, sampling: SampleConfig, mesh: Mesh) -> Draw:
    """Make the sampler: one `lax.scan` over its steps. Raises InputError for impossible steps, and for guidance without
    a null class.
    """
    if sampling.guidance != 1 and not cfg.null_class:
        raise InputError(
            f"guidance {sampling.guidance:g}: this model was never trained without labels (no null class); set"
            " guidance 1"
        )
    sampler = sampling.make()
    times = jnp.asarray(sampler.time, jnp.float32)

    def draw(params: Mapping[str, Any], unique: jax.Array, which: jax.Array, keys: jax.Array) -> jax.Array:
        n = len(which)
        modulations = partial(model.apply, params, method="modulations")
        size = len(sampler) * len(unique) * (6 * cfg.layers + 2) * cfg.width * 4
        precomputed = None
        if size <= PRECOMPUTE_LIMIT:
            t, labels = (x.ravel() for x in jnp.meshgrid(times, unique, indexing="ij"))
            precomputed = jax.tree.map(
                lambda x: x.reshape(*x.shape[:-2], len(sampler), len(unique), -1), modulations(t, labels)
            )

        def denoise(x: jax.Array, i: jax.Array) -> Prediction:
            if precomputed is None:
                modulation = modulations(jnp.full(len(unique), times[i]), unique)
            else:
                modulation = jax.tree.map(lambda x: x[..., i, :, :], precomputed)

            def predict(rows: jax.Array) -> Prediction:
                return split(
                    model.apply(params, x, Modulation(*(m[..., rows, :] for m in modulation)), method="denoise")
                )

            if sampling.guidance == 1:
                return predict(which)
            return guide(predict(which), predict(jnp.full(n, len(unique) - 1)), sampling)

        start, noise = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x = jax.vmap(lambda key: jax.random.normal(key, (cfg.size, cfg.size, cfg.channels)))(start)
        return sampler.run(denoise, jax.lax.with_sharding_constraint(x, batch_sharding(mesh)), noise)

    return Draw(cfg=cfg, sampling=sampling, mesh=mesh, compiled=jax.jit(draw, out_shardings=replicated(mesh)))


def guide(conditional: Prediction, unconditional: Prediction, sampling: SampleConfig) -> Prediction:
    """Apply classifier-free guidance to the noise of the guided channels; the variance stays the conditional one."""
    guided = unconditional.noise + sampling.guidance * (conditional.noise - unconditional.noise)
    if sampling.guided == "first three":
        guided = jnp.concatenate([guided[..., :3], conditional.noise[..., 3:]], axis=-1)
    return Prediction(guided, conditional.ratio)

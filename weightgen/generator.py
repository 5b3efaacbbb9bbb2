"""The generator: codec, condition and denoiser as one model, its loss, and how it is sampled."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heirloom.common.diffusion import Prediction, Schedule, add_noise, ddim, ddpm, linear_schedule, respace, scaled_linear_schedule
from heirloom.common.errors import InputError, positive
from heirloom.common.nn.dense import param, zeros
from heirloom.common.nn.functional import Functional
from heirloom.common.nn.precision import lookup
from weightgen.autoencoder import TokenCodec, TokenVaeConfig
from weightgen.baselines import Ridge, row_condition
from weightgen.codec import Pca, fit_pca
from weightgen.conditions import Condition, Label, MlpSet, PerClass, SetConfig, SetOfSets, Text
from weightgen.data import Bank
from weightgen.denoiser import DenoiserConfig, TokenDit
from weightgen.nets import NetConfig
from weightgen.tokens import TokenSpec, one_chunk
from weightgen.zoo import Zoo, flat, head_tokens

FULL = 1000  # steps of the default schedule

Told = Literal["per_class", "set", "mlp", "text", "label", "chunk"]


@dataclass(frozen=True)
class GeneratorConfig:
    """A generator of the weights of one architecture, told by pictures of classes, by words, or by a number."""

    net: NetConfig | None = field(default_factory=NetConfig)
    """None: checkpoints of others, cut as `cut` says."""
    latent: int = 48
    """Numbers a token is coded in."""
    condition: Told = "per_class"
    """per_class: a token for each class, equivariant to their order; set: the released Set Transformers, which do not know the order;
    mlp: the released dense layers over slots, which do; text: an embedding of words; label: one of the tasks of the zoo;
    chunk: the number of the chunk, each drawn by itself."""
    shots: int = 5
    """Pictures of each class it looks at, at most."""
    prior: Literal["none", "linear"] = "linear"
    """linear: a ridge map from the condition to the weights, fitted before; diffusion then models what it leaves."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    told: int = 0
    """Features of the pictures in the condition, or of a text; 0: as many as the network has inputs."""
    schedule: Literal["linear", "scaled_linear"] = "linear"
    """linear: 1000 steps of DDPM; scaled_linear: 1024 steps as released."""
    cut: TokenSpec | None = None
    codec: TokenVaeConfig | None = None
    """None: PCA."""
    encoder: SetConfig | None = None
    """Sizes of the Set Transformers of the condition `set`; None: the released ones."""
    labels: int = 0
    """Tasks or chunks there are."""

    def __post_init__(self) -> None:
        positive(self, "latent", "shots")
        if self.prior == "linear" and self.condition in ("label", "chunk"):
            raise InputError(f'a linear map of a {self.condition}\'s number means nothing: set prior to "none"')
        if self.prior == "linear" and self.codec is not None:
            raise InputError('a learned codec codes weights, not what a linear prior leaves of them: set prior to "none"')
        if self.net is None and self.cut is None:
            raise InputError("a generator needs a network, or how checkpoints are cut")

    @property
    def tokens(self) -> TokenSpec:
        """How what it makes in one go is laid out: a network, or a single chunk of one."""
        return one_chunk(self.whole) if self.condition == "chunk" else self.whole

    @property
    def whole(self) -> TokenSpec:
        """How a finished network is laid out."""
        return self.cut or head_tokens(self.net or NetConfig())

    @property
    def features(self) -> int:
        """Numbers a picture or a text is told in."""
        return self.told or (self.net.features if self.net else 0)

    @property
    def ways(self) -> int:
        """Classes in a condition."""
        return self.net.classes if self.net else 1

    @property
    def fitted(self) -> tuple[str, ...]:
        """Patterns of what is fitted before training and never updated."""
        return ("codec/**", "prior/**") if self.prior == "linear" else ("codec/**",)

    @property
    def by_row(self) -> bool:
        """Rows of a head are exchangeable where each is told its class; other tokens are known by their place."""
        placed = self.codec is not None and self.codec.order == "ordered"
        return self.net is not None and self.net.kind == "head" and self.condition == "per_class" and not placed

    def chain(self) -> Schedule:
        return linear_schedule(FULL) if self.schedule == "linear" else scaled_linear_schedule()


class RowPrior(nnx.Module):
    """Rows of a head by a linear map of `row_condition`, one map for each number of pictures. mean: [batch, class, feature]."""

    def __init__(self, cfg: GeneratorConfig, *, rngs: nnx.Rngs):
        sizes = {"shots": cfg.shots, "condition": 4 * cfg.features + 3, "weight": cfg.tokens.length}
        self.table = param("shots condition -> weight", sizes, zeros, rngs)

    def __call__(self, mean: jax.Array, shots: jax.Array) -> jax.Array:
        condition = row_condition(mean)
        condition = jnp.concatenate([condition, jnp.ones_like(condition[..., :1])], -1)
        return jnp.einsum("bci,bio->bco", condition, lookup(self.table[...], shots - 1))


class WholePrior(nnx.Module):
    """All weights of a network by a linear map of its classes' means, end to end in their order. mean: [batch, class, feature]."""

    def __init__(self, cfg: GeneratorConfig, *, rngs: nnx.Rngs):
        self.spec = cfg.tokens
        sizes = {"shots": cfg.shots, "condition": cfg.ways * cfg.features + 1, "weight": self.spec.count}
        self.table = param("shots condition -> weight", sizes, zeros, rngs)

    def __call__(self, mean: jax.Array, shots: jax.Array) -> jax.Array:
        condition = mean.reshape(len(mean), -1)
        condition = jnp.concatenate([condition, jnp.ones_like(condition[:, :1])], -1)
        weights = jnp.einsum("bi,bio->bo", condition, lookup(self.table[...], shots - 1))
        return jnp.zeros((len(mean), *self.spec.mask.shape)).at[:, self.spec.mask].set(weights)


class Generator(nnx.Module):
    """Latents, noise and pictures to a prediction. Tokens are the network's neurons, [batch, token, length].

    support: [batch, class, shots, feature]; there: [batch, class, shots] bool; none at all is how guidance asks without a condition.
    """

    def __init__(self, cfg: GeneratorConfig, *, rngs: nnx.Rngs):
        spec, width = cfg.tokens, cfg.denoiser.width
        pca = partial(Pca, 1 if cfg.by_row else spec.rows, spec.length, cfg.latent)
        self.codec: Any = pca(rngs=rngs) if cfg.codec is None else TokenCodec(cfg.codec, rngs=rngs)
        self.condition = CONDITIONS[cfg.condition](cfg, width, rngs)
        prior = RowPrior if cfg.by_row else WholePrior
        self.prior: Any = prior(cfg, rngs=rngs) if cfg.prior == "linear" else None
        latent = cfg.latent if cfg.codec is None else cfg.codec.latent
        self.denoiser = TokenDit(cfg.denoiser, latent, spec.rows, "exchangeable" if cfg.by_row else "ordered", rngs=rngs)
        self.rows = spec.rows
        self.first_class = next((piece.first for piece in spec.pieces if piece.path == "out/kernel"), 0)
        self.cfg = cfg

    def __call__(self, noisy: jax.Array, t: jax.Array, support: jax.Array, there: jax.Array) -> jax.Array:
        return self.denoiser(noisy, t, self.told(support, there))

    def told(self, support: jax.Array, there: jax.Array) -> Condition:
        cfg = self.cfg
        if cfg.condition in ("label", "chunk"):
            number = jnp.where(there[:, 0, 0], support[:, 0, 0, 0].astype(jnp.int32), cfg.labels)
            return Condition(None, self.condition(number))
        if cfg.condition == "text":
            return Condition(None, self.condition(support[:, 0, 0] * there[:, 0, 0, None]))
        if cfg.condition != "per_class":
            return Condition(None, self.condition(support * there[..., None]))
        found = self.condition(support, there)
        if cfg.by_row:
            return found
        if cfg.net is None:
            return Condition(None, found.whole)
        # The rows of the last layer are the classes; the other neurons are told the task as a whole.
        before = self.first_class
        return Condition(jnp.pad(found.tokens, ((0, 0), (before, self.rows - before - cfg.ways), (0, 0))), found.whole)

    def predict(self, noisy: jax.Array, t: jax.Array, told: Condition) -> jax.Array:
        return self.denoiser(noisy, t, told)

    def expected(self, support: jax.Array, there: jax.Array) -> jax.Array:
        """What the prior says of the tokens, [batch, token, length]; 0 without one."""
        if self.prior is None:
            return jnp.zeros(())
        count = there.sum(2)
        mean = (support * there[..., None]).sum(2) / jnp.maximum(count, 1)[..., None]
        return self.prior(mean, jnp.maximum(count[:, 0], 1))

    def encode(self, tokens: jax.Array, support: jax.Array, there: jax.Array) -> jax.Array:
        return self.codec.encode(tokens - self.expected(support, there))

    def decode(self, latents: jax.Array, support: jax.Array, there: jax.Array) -> jax.Array:
        return self.codec.decode(latents) + self.expected(support, there)


CONDITIONS: dict[str, Callable[[GeneratorConfig, int, nnx.Rngs], Any]] = {
    "per_class": lambda cfg, width, rngs: PerClass(cfg.features, width, rngs=rngs),
    "set": lambda cfg, width, rngs: SetOfSets(replace(cfg.encoder or SetConfig(features=cfg.features), latent=width), rngs=rngs),
    "mlp": lambda cfg, width, rngs: MlpSet(cfg.features, cfg.ways * cfg.shots, width, rngs=rngs),
    "text": lambda cfg, width, rngs: Text(cfg.features, width, rngs=rngs),
    "label": lambda cfg, width, rngs: Label(cfg.labels, width, rngs=rngs),
    "chunk": lambda cfg, width, rngs: Label(cfg.labels, width, rngs=rngs),
}


def fit_stage1(cfg: GeneratorConfig, zoo: Zoo, bank: Bank, seed: int = 0, most: int = 4000) -> dict[str, np.ndarray]:
    """What needs no training: the linear prior, and PCA of what it leaves, from at most `most` networks of the zoo."""
    rng = np.random.default_rng(seed)
    rows = np.arange(len(zoo)) if len(zoo) <= most else np.sort(rng.choice(len(zoo), most, replace=False))
    tokens, fitted = zoo.tokens(rows), {}
    rest = [tokens]
    if cfg.prior == "linear":
        classes = np.asarray(zoo.classes[rows])
        support, maps, rest = bank.draw(classes, cfg.shots, rng), [], []
        for shots in range(1, cfg.shots + 1):
            mean = support[:, :, :shots].mean(2)
            if cfg.by_row:
                condition = row_condition(mean)
                ridge = Ridge.fit(condition.reshape(-1, condition.shape[-1]), tokens.reshape(-1, tokens.shape[-1]), classes.reshape(-1))
                expected = ridge(condition)
            else:
                condition = mean.reshape(len(mean), -1)
                ridge = Ridge.fit(condition, flat(zoo.spec, tokens), classes[:, 0])
                expected = zoo.spec.padded(ridge(condition))
            maps.append(ridge.matrix)
            rest.append(tokens - expected)
        fitted["prior/table"] = np.stack(maps).astype(np.float32)
    if cfg.codec is not None:
        return fitted
    left = np.concatenate(rest)
    mean = left.mean((0, 1) if cfg.by_row else 0, dtype=np.float64).astype(np.float32).reshape(-1, tokens.shape[-1])
    pca = fit_pca((left - mean).reshape(-1, tokens.shape[-1]), cfg.latent)
    return fitted | {"codec/mean": mean + pca.mean, "codec/components": pca.components, "codec/scale": pca.scale}


def loss(
    model: Functional, cfg: GeneratorConfig, dropout: float
) -> Callable[[dict[str, Any], dict[str, Any], jax.Array, Any], tuple[jax.Array, dict[str, Any]]]:
    """Mean squared error of v = alpha noise - sigma clean, times uniform; the condition is dropped with probability `dropout`.

    batch: tokens [b, token, length] f32, support [b, class, shots, feature] f32, shots [b] int32.
    Deviation: the released model predicts the noise; v keeps the conditional mean well scaled at all times.
    """
    schedule = cfg.chain()

    def value(params: dict[str, Any], batch: dict[str, Any], key: jax.Array, frozen: Any) -> tuple[jax.Array, dict[str, Any]]:
        times, noises, drops = jax.random.split(key, 3)
        seen = jnp.broadcast_to(jnp.arange(batch["support"].shape[2]) < batch["shots"][:, None, None], batch["support"].shape[:3])
        clean = jax.lax.stop_gradient(model.apply(params, batch["tokens"], batch["support"], seen, method="encode"))
        step = jax.random.randint(times, (len(clean),), 0, len(schedule))
        noise = jax.random.normal(noises, clean.shape)
        kept = jax.random.uniform(drops, (len(clean), 1, 1)) >= dropout
        there = seen & kept
        predicted = model.apply(params, add_noise(schedule, clean, step, noise), jnp.asarray(schedule.time)[step], batch["support"], there)
        alpha, sigma = _alpha_sigma(schedule, step)
        error = jnp.mean(jnp.square(predicted - (alpha * noise - sigma * clean)))
        return error, {}

    return value


def _alpha_sigma(schedule: Schedule, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    bar = jnp.asarray(schedule.alpha_bar, jnp.float32)[step][:, None, None]
    return jnp.sqrt(bar), jnp.sqrt(1 - bar)


@dataclass(frozen=True)
class SampleConfig:
    """How weights are drawn."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: int = 50
    guidance: float = 1.0
    """Above 1: away from what is predicted without a condition."""
    strength: float = 1.0
    """How far given weights are noised before they are denoised, as a share of the chain; 1: from pure noise."""

    def __post_init__(self) -> None:
        if self.steps < 2:  # the first is at the noisiest time and the last at the cleanest: one alone would be the latter
            raise InputError(f"{self.steps} steps: take 2 or more")
        if not 0 < self.strength <= 1:
            raise InputError(f"a strength of {self.strength:g}: choose above 0 and up to 1")


Draw = Callable[..., jax.Array]


def drawer(model: Functional, cfg: GeneratorConfig, how: SampleConfig) -> Draw:
    """`draw(params, support, there, key, index, start=None, known=None)`: tokens [batch, token, length] f32, compiled once per shape.

    index: [batch] int32, which sample of the seed a row is: (key, index) fixes its noise, that of ddpm's steps too, on any number of
    devices. start: tokens to refine (with `strength` below 1), or whose parts are kept where `known` [token] is True (in-painting).
    ddpm has the posterior's variance. Raises InputError for a strength below 1 and nothing to start from.
    """
    full = cfg.chain()
    chain = respace(full, min(how.steps, len(full)))
    sampler = ddim(chain) if how.sampler == "ddim" else ddpm(chain)
    first = len(sampler) - max(round(how.strength * len(sampler)), 1)
    sampler = type(sampler)(*(getattr(sampler, name)[first:] for name in sampler.__dataclass_fields__))

    @jax.jit
    def draw(
        params: Any, support: jax.Array, there: jax.Array, key: jax.Array, index: jax.Array, start: Any = None, known: Any = None
    ) -> jax.Array:
        if start is None and how.strength < 1:
            raise InputError(f"a strength of {how.strength:g} refines given weights, and none are given: leave it at 1")
        latent = cfg.latent if cfg.codec is None else cfg.codec.latent
        keys = jax.vmap(partial(jax.random.fold_in, key))(index)
        noise = jax.vmap(lambda k: jax.random.normal(k, (cfg.tokens.rows, latent)))(keys)
        clean = None if start is None else model.apply(params, start, support, there, method="encode")
        told = model.apply(params, support, there, method="told")
        untold = model.apply(params, support, jnp.zeros_like(there), method="told") if how.guidance != 1 else None

        def denoise(x: jax.Array, i: jax.Array) -> Prediction:
            t = jnp.full(len(x), jnp.asarray(sampler.time, jnp.float32)[i])
            alpha, sigma = (jnp.asarray(table, jnp.float32)[i] for table in (sampler.alpha, sampler.sigma))
            if clean is not None and known is not None:
                x = jnp.where(known[:, None], alpha * clean + sigma * noise, x)
            v = model.apply(params, x, t, told, method="predict")
            if untold is not None:
                away = model.apply(params, x, t, untold, method="predict")
                v = away + how.guidance * (v - away)
            predicted = sigma * x + alpha * v
            if clean is not None and known is not None:
                predicted = jnp.where(known[:, None], noise, predicted)
            return Prediction(predicted, -jnp.ones_like(x))  # -1: the smaller of both variances, the posterior's

        x = noise
        if clean is not None and how.strength < 1:
            x = float(sampler.alpha[0]) * clean + float(sampler.sigma[0]) * noise
        out = model.apply(params, sampler.run(denoise, x, keys), support, there, method="decode")
        return out if start is None or known is None else jnp.where(known[:, None], start, out)

    return draw


def reduce_mean(tokens: np.ndarray) -> np.ndarray:
    """The average of samples [n, ...] in weight space: for convex heads the conditional mean, which one sample is not."""
    return np.mean(tokens, axis=0)

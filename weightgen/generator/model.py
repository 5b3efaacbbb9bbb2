"""The generator: codec, prior, condition and denoiser as one model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heirloom.common.nn.dense import param, zeros
from heirloom.common.nn.precision import lookup
from weightgen.baselines import Ridge, row_condition
from weightgen.codec import Pca, TokenCodec, fit_pca
from weightgen.generator.conditions import Condition, Label, MlpSet, PerClass, SetConfig, SetOfSets, Text
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.denoiser import TokenDit
from weightgen.tokens import Order
from weightgen.zoo.data import Bank
from weightgen.zoo.zoo import Zoo, flat


class RowPrior(nnx.Module):
    """Rows of a head by a linear map of `row_condition`, one per number of pictures. mean: [batch, class, feature]."""

    def __init__(self, cfg: GeneratorConfig, *, rngs: nnx.Rngs):
        sizes = {"shots": cfg.shots, "condition": 4 * cfg.features + 3, "weight": cfg.tokens.length}
        self.table = param("shots condition -> weight", sizes, zeros, rngs)

    def __call__(self, mean: jax.Array, shots: jax.Array) -> jax.Array:
        condition = row_condition(mean)
        condition = jnp.concatenate([condition, jnp.ones_like(condition[..., :1])], -1)
        return jnp.einsum("bci,bio->bco", condition, lookup(self.table[...], shots - 1))


class WholePrior(nnx.Module):
    """A network's weights, in order, by a linear map of its classes' means. mean: [batch, class, feature]."""

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

    support: [batch, class, shots, feature]; mask: [batch, class, shots] bool, which pictures count; all False:
    unconditional.
    """

    def __init__(self, cfg: GeneratorConfig, *, rngs: nnx.Rngs):
        spec, width = cfg.tokens, cfg.denoiser.width
        rows = 1 if cfg.by_row else spec.rows
        self.codec: Any = (
            TokenCodec(cfg.codec, rngs=rngs) if cfg.codec else Pca(rows, spec.length, cfg.latent, rngs=rngs)
        )
        self.condition = CONDITIONS[cfg.condition](cfg, width, rngs)
        prior = RowPrior if cfg.by_row else WholePrior
        self.prior: Any = prior(cfg, rngs=rngs) if cfg.prior == "linear" else None
        order: Order = "exchangeable" if cfg.by_row else "ordered"
        self.denoiser = TokenDit(cfg.denoiser, cfg.latent_size, spec.rows, order=order, rngs=rngs)
        self.rows = spec.rows
        self.first_class = next((piece.first for piece in spec.pieces if piece.path == "out/kernel"), 0)
        self.cfg = cfg

    def __call__(self, noisy: jax.Array, t: jax.Array, support: jax.Array, mask: jax.Array) -> jax.Array:
        return self.denoiser(noisy, t, self.embed(support, mask))

    def embed(self, support: jax.Array, mask: jax.Array) -> Condition:
        """The condition for the denoiser."""
        cfg = self.cfg
        if cfg.condition in ("label", "chunk"):
            number = jnp.where(mask[:, 0, 0], support[:, 0, 0, 0].astype(jnp.int32), cfg.labels)
            return Condition(None, self.condition(number))
        if cfg.condition == "text":
            return Condition(None, self.condition(support[:, 0, 0] * mask[:, 0, 0, None]))
        if cfg.condition != "per_class":
            return Condition(None, self.condition(support * mask[..., None]))
        found = self.condition(support, mask)
        if cfg.by_row:
            return found
        if cfg.net is None:
            return Condition(None, found.whole)
        # The rows of the last layer are the classes; the other neurons get the condition of the whole task.
        before = self.first_class
        return Condition(jnp.pad(found.tokens, ((0, 0), (before, self.rows - before - cfg.ways), (0, 0))), found.whole)

    def predict(self, noisy: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
        return self.denoiser(noisy, t, condition)

    def expected(self, support: jax.Array, mask: jax.Array) -> jax.Array:
        """The prior's prediction of the tokens, [batch, token, length]; 0 without a prior."""
        if self.prior is None:
            return jnp.zeros(())
        count = mask.sum(2)
        mean = (support * mask[..., None]).sum(2) / jnp.maximum(count, 1)[..., None]
        return self.prior(mean, jnp.maximum(count[:, 0], 1))

    def encode(self, tokens: jax.Array, support: jax.Array, mask: jax.Array) -> jax.Array:
        return self.codec.encode(tokens - self.expected(support, mask))

    def decode(self, latents: jax.Array, support: jax.Array, mask: jax.Array) -> jax.Array:
        return self.codec.decode(latents) + self.expected(support, mask)


CONDITIONS: dict[str, Callable[[GeneratorConfig, int, nnx.Rngs], Any]] = {
    "per_class": lambda cfg, width, rngs: PerClass(cfg.features, width, rngs=rngs),
    "set": lambda cfg, width, rngs: SetOfSets(
        replace(cfg.encoder or SetConfig(features=cfg.features), latent=width), rngs=rngs
    ),
    "mlp": lambda cfg, width, rngs: MlpSet(cfg.features, cfg.ways * cfg.shots, width, rngs=rngs),
    "text": lambda cfg, width, rngs: Text(cfg.features, width, rngs=rngs),
    "label": lambda cfg, width, rngs: Label(cfg.labels, width, rngs=rngs),
    "chunk": lambda cfg, width, rngs: Label(cfg.labels, width, rngs=rngs),
}


def fit_stage1(cfg: GeneratorConfig, zoo: Zoo, bank: Bank, seed: int = 0, most: int = 4000) -> dict[str, np.ndarray]:
    """Fits what needs no training: the linear prior, and PCA of its residual, on at most `most` networks of the zoo."""
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
                x, y = condition.reshape(-1, condition.shape[-1]), tokens.reshape(-1, tokens.shape[-1])
                ridge = Ridge.fit(x, y, classes.reshape(-1))
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

"""The posterior of a variational autoencoder: a normal distribution of independent numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOGVAR = (-30.0, 20.0)  # the bounds of latent diffusion (arXiv 2112.10752; DiagonalGaussianDistribution)


class Moments(NamedTuple):
    """Mean and logarithm of the variance of latents, not scaled: [batch, ..., latent] each."""

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def bounded(cls, mean: jax.Array, logvar: jax.Array) -> "Moments":
        """The moments as an encoder gives them, with logvar kept within -30 and 20."""
        return cls(mean, jnp.clip(logvar, *LOGVAR))

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw latents in f32: mean + exp(logvar / 2) noise."""
        mean, logvar = (x.astype(jnp.float32) for x in self)
        return mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)

    def kl(self) -> jax.Array:
        """The KL divergence from N(0, 1), [batch], summed over the latent (nats)."""
        terms = self.mean**2 + jnp.exp(self.logvar) - 1 - self.logvar
        return 0.5 * terms.reshape(len(self.mean), -1).sum(1)

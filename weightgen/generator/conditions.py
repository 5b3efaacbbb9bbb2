"""Encoders of the condition: sets of picture features by class, text, labels of chunks."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError, positive
from heirloom.common.nn.dense import Dense, Init, normal, param, uniform_fan_in, xavier_uniform
from heirloom.common.nn.precision import add, lookup, product

XAVIER = xavier_uniform()
LEARNED_POINTS = ("**/points1", "**/points2", "**/seed")  # of Set Transformers: no kernels, never decayed


class Condition(NamedTuple):
    """For the denoiser. tokens: [batch, token, embed], None where only the network has one; whole: [batch, embed]."""

    tokens: jax.Array | None
    whole: jax.Array


class PerClass(nnx.Module):
    """A token for each class from its pictures, and their mean for the task: equivariant to the order of classes.

    x: [batch, class, picture, feature]; mask: [batch, class, picture] bool, which pictures count. Invariant to their
    order.
    """

    def __init__(self, features: int, embed: int, *, rngs: nnx.Rngs):
        sizes = {"feature": features, "embed": embed}
        self.each = Dense("feature -> embed", sizes, rngs=rngs)
        self.mean = Dense("feature -> embed", sizes, rngs=rngs)
        self.pooled = Dense("embed -> embed", sizes, rngs=rngs)
        self.count = Dense("one -> embed", sizes | {"one": 1}, init=normal(0.02), bias=None, rngs=rngs)
        self.whole = Dense("embed -> embed", sizes, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> Condition:
        weight = mask[..., None].astype(x.dtype)
        seen = weight.sum(2)
        count = jnp.maximum(seen, 1)
        mean = (x * weight).sum(2) / count
        pooled = (jax.nn.gelu(self.each(x)) * weight).sum(2) / count
        tokens = self.mean(mean) + self.pooled(pooled) + self.count(jnp.log1p(seen))
        return Condition(tokens, self.whole(tokens.mean(1)))


@dataclass(frozen=True)
class SetConfig:
    """The released Set Transformer: 684,160 parameters."""

    features: int = 512
    hidden: int = 128
    heads: int = 2
    inducing: int = 32
    out: int = 512
    latent: int = 1024
    """Numbers that a set of sets becomes."""

    def __post_init__(self) -> None:
        positive(self, "features", "hidden", "heads", "inducing", "out", "latent")
        if self.hidden % self.heads:
            raise InputError(f"{self.heads} heads do not divide hidden {self.hidden}: change heads or hidden")


class Mab(nnx.Module):
    """Multihead attention block of the Set Transformer: [batch, q, query_in], [batch, k, key_in] -> [batch, q, hidden].

    The residual is the projected query, and scores are divided by the root of the whole width, as the released code
    does.
    """

    def __init__(self, query_in: int, key_in: int, hidden: int, heads: int, *, rngs: nnx.Rngs):
        sizes: dict[str, int] = {"query_in": query_in, "key_in": key_in, "embed": hidden}
        sizes |= {"head": heads, "head_dim": hidden // heads}
        self.query = Dense("query_in -> head head_dim", sizes, bias=uniform_fan_in, rngs=rngs)
        self.key = Dense("key_in -> head head_dim", sizes, bias=uniform_fan_in, rngs=rngs)
        self.value = Dense("key_in -> head head_dim", sizes, bias=uniform_fan_in, rngs=rngs)
        self.out = Dense("embed -> embed", sizes, bias=uniform_fan_in, rngs=rngs)
        self.hidden = hidden

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        q = self.query(query)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, self.key(key)) / self.hidden**0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), self.value(key))
        out = (q + mixed).reshape(*q.shape[:2], self.hidden)
        return out + jax.nn.relu(self.out(out))


class SetTransformer(nnx.Module):
    """ISAB, ISAB, pooling by one seed, SAB, SAB, linear: a set [batch, element, feature] to [batch, out]."""

    def __init__(self, cfg: SetConfig, *, rngs: nnx.Rngs):
        h, heads = cfg.hidden, cfg.heads
        init: Init = XAVIER
        self.points1 = param("inducing -> embed", {"inducing": cfg.inducing, "embed": h}, init, rngs)
        self.to_points1 = Mab(h, cfg.features, h, heads=heads, rngs=rngs)
        self.from_points1 = Mab(cfg.features, h, h, heads=heads, rngs=rngs)
        self.points2 = param("inducing -> embed", {"inducing": cfg.inducing, "embed": h}, init, rngs)
        self.to_points2, self.from_points2 = Mab(h, h, h, heads=heads, rngs=rngs), Mab(h, h, h, heads=heads, rngs=rngs)
        self.seed = param("inducing -> embed", {"inducing": 1, "embed": h}, init, rngs)
        self.pool = Mab(h, h, h, heads=heads, rngs=rngs)
        self.mix1, self.mix2 = Mab(h, h, h, heads=heads, rngs=rngs), Mab(h, h, h, heads=heads, rngs=rngs)
        self.out = Dense("embed -> out", {"embed": h, "out": cfg.out}, bias=uniform_fan_in, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def given(points: nnx.Param) -> jax.Array:
            return jnp.broadcast_to(points[...], (len(x), *points.shape))

        x = self.from_points1(x, self.to_points1(given(self.points1), x))
        x = self.from_points2(x, self.to_points2(given(self.points2), x))
        x = self.pool(given(self.seed), x)
        x = self.mix1(x, x)
        return self.out(self.mix2(x, x)[:, 0])


class SetOfSets(nnx.Module):
    """The released data-set encoder: a Set Transformer over a class's pictures, one over classes, a linear layer.

    x: [batch, class, picture, feature]; returns [batch, latent]. Invariant to the order of classes: unlike
    `PerClass` it does not tell which row of a head belongs to which class.
    """

    def __init__(self, cfg: SetConfig, *, rngs: nnx.Rngs):
        self.intra = SetTransformer(cfg, rngs=rngs)
        self.inter = SetTransformer(replace(cfg, features=cfg.out), rngs=rngs)
        self.out = Dense("embed -> latent", {"embed": cfg.out, "latent": cfg.latent}, bias=uniform_fan_in, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, classes = x.shape[:2]
        inner = self.intra(x.reshape(batch * classes, *x.shape[2:]))
        return self.out(self.inter(inner.reshape(batch, classes, -1)))


class MlpSet(nnx.Module):
    """The released default: a dense layer over (picture, class) slots, then over features. Order-sensitive.

    x: [batch, class, picture, feature]; slots are picture-major; tasks with fewer classes use the first slots, as
    released.
    """

    def __init__(self, features: int = 512, slots: int = 50, latent: int = 1024, *, rngs: nnx.Rngs):
        sizes = {"slot": slots, "mixed": 4, "feature": features, "latent": latent}
        self.kernel = param("slot -> mixed", sizes, uniform_fan_in, rngs)
        self.bias = param("-> mixed", sizes, uniform_fan_in, rngs, fan_in=slots)
        self.out = Dense("feature mixed -> latent", sizes, bias=uniform_fan_in, rngs=rngs)
        self.slots = slots

    def __call__(self, x: jax.Array) -> jax.Array:
        slots = x.transpose(0, 3, 2, 1).reshape(len(x), x.shape[-1], -1)[..., : self.slots]
        mixed = add(product("bfs,sm->bfm", slots, self.kernel[...][: slots.shape[-1]]), self.bias[...])
        return self.out(jax.nn.leaky_relu(mixed, 0.01))


class Label(nnx.Module):
    """A learned embedding of an integer, such as which chunk of a checkpoint a row is. label: [batch] int32.

    The label `labels` is the unconditional one, for guidance.
    """

    def __init__(self, labels: int, embed: int, *, rngs: nnx.Rngs):
        self.table = param("label -> embed", {"label": labels + 1, "embed": embed}, normal(0.02), rngs)

    def __call__(self, label: jax.Array) -> jax.Array:
        return lookup(self.table[...], label)


class Text(nnx.Module):
    """Embeddings of a description, from any text encoder, to the width of the denoiser. x: [batch, feature]."""

    def __init__(self, features: int, embed: int, *, rngs: nnx.Rngs):
        self.out = Dense("feature -> embed", {"feature": features, "embed": embed}, bias=uniform_fan_in, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(x)

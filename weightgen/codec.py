"""Weights to latents and back: PCA (default, needs no training), a token autoencoder, and the gate for both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.attention import Attention, softmax
from heirloom.common.nn.block import Block, scan, stack
from heirloom.common.nn.dense import Dense, normal, param, xavier_uniform, zeros
from heirloom.common.nn.moments import Moments
from weightgen.metrics import accuracy
from weightgen.tokens import Order, TokenSpec
from weightgen.zoo.data import Bank, network_inputs
from weightgen.zoo.nets import predict
from weightgen.zoo.zoo import Zoo, flat


@dataclass(frozen=True)
class PcaFit:
    """A fitted PCA. mean: [length]; components: [length, latent] orthonormal; scale: one number for all latents."""

    mean: np.ndarray
    components: np.ndarray
    scale: np.ndarray


def fit_pca(rows: np.ndarray, latent: int) -> PcaFit:
    """Fit PCA to rows [n, length], with one scale, so that directions of little weight stay small."""
    if latent > min(rows.shape):
        rows_of = f"{rows.shape[0]} rows of {rows.shape[1]} weights"
        raise InputError(f"{latent} components of {rows_of}: ask for {min(rows.shape)} at most")
    mean = rows.mean(0, dtype=np.float64)
    centred = rows - mean
    # Of the smaller Gram matrix: rows are many and short, or few and long.
    if rows.shape[0] >= rows.shape[1]:
        components = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :latent]
    else:
        components = np.linalg.svd(centred, full_matrices=False)[2][:latent].T
    scale = (centred @ components).std()
    if not scale > 0:
        raise InputError(f"all {rows.shape[0]} rows of weights are the same, nothing to learn from: add other networks")
    return PcaFit(*(np.asarray(x, np.float32) for x in (mean, components, scale)))


class Pca(nnx.Module):
    """Encode tokens [..., token, length] to latents [..., token, latent] of spread 1, and decode; fitted.

    tokens: 1 where all share a mean, as the rows of a head do; else each token has its own, that of the zoo's mean
    network.
    """

    def __init__(self, tokens: int, length: int, latent: int, *, rngs: nnx.Rngs):
        sizes = {"token": tokens, "weight": length, "latent": latent}
        self.mean = param("token weight", sizes, zeros, rngs)
        self.components = param("weight -> latent", sizes, zeros, rngs)
        self.scale = param("", sizes, zeros, rngs)

    def encode(self, tokens: jax.Array) -> jax.Array:
        return (tokens - self.mean[...]) @ self.components[...] / self.scale[...]

    def decode(self, latents: jax.Array) -> jax.Array:
        return (latents * self.scale[...]) @ self.components[...].T + self.mean[...]


EPS = 1e-6  # of layer norms
XAVIER = xavier_uniform()


def tensor_scale(spec: TokenSpec, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure mean and standard deviation of each tensor over a zoo. tokens: [member, rows, length].

    Returns two arrays [rows, length] f32; in the padding they are 0 and 1.
    """
    mean, std = np.zeros(spec.mask.shape), np.ones(spec.mask.shape)
    for i in range(len(spec.pieces)):
        values = np.asarray(tokens[:, spec.tensor == i], np.float64)
        mean[spec.tensor == i], std[spec.tensor == i] = values.mean(), max(values.std(), 1e-12)
    return mean.astype(np.float32), std.astype(np.float32)


@dataclass(frozen=True)
class TokenVaeConfig:
    """A transformer over the tokens of a network."""

    tokens: int = 21
    length: int = 65
    latent: int = 16
    """Numbers each token becomes."""
    width: int = 64
    layers: int = 2
    heads: int = 4
    normalise: Literal["none", "tensor", "scale", "row"] = "tensor"
    """How the fitted mean and standard deviation were found. scale and row are of folders that were written before and
    are read alike.
    """
    order: Order = "ordered"
    """exchangeable: tokens are known by no place, as the rows of a head are not; the codec is equivariant to their
    order.
    """

    def __post_init__(self) -> None:
        positive(self, "tokens", "length", "latent", "width", "layers", "heads")


class TokenVae(nnx.Module):
    """Tokens [batch, token, length] to latents [batch, token, latent], and back; tokens attend both ways."""

    def __init__(self, cfg: TokenVaeConfig, *, rngs: nnx.Rngs):
        if cfg.width % cfg.heads:
            raise InputError(f"{cfg.heads} heads do not divide a width of {cfg.width}: change heads or width")
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.width // cfg.heads, hidden=4 * cfg.width)
        sizes |= dict(weight=cfg.length, latent=cfg.latent, token=cfg.tokens, part=2)
        block: dict[str, Any] = dict(activation="gelu_tanh", eps=EPS, up=XAVIER, down=XAVIER, bias=zeros)

        def blocks() -> nnx.Module:
            def attention(*, rngs: nnx.Rngs) -> Attention:
                return Attention(sizes, attend=softmax(), rngs=rngs)

            return stack(lambda rngs: Block(sizes, attention=attention, **block, rngs=rngs), cfg.layers, rngs)

        self.enter, self.leave = Dense("weight -> embed", sizes, rngs=rngs), Dense("embed -> weight", sizes, rngs=rngs)
        self.shrink = Dense("embed -> part latent", sizes, rngs=rngs)
        self.grow = Dense("latent -> embed", sizes, rngs=rngs)
        self.position = param("token -> embed", sizes, normal(0.02), rngs) if cfg.order == "ordered" else None
        self.encoder, self.decoder = blocks(), blocks()

    def _placed(self, h: jax.Array) -> jax.Array:
        return h if self.position is None else h + self.position[...]

    def encode(self, x: jax.Array) -> Moments:
        h = scan(self.encoder, self._placed(self.enter(x)))
        return Moments.bounded(*jnp.moveaxis(self.shrink(h), 2, 0))

    def decode(self, z: jax.Array) -> jax.Array:
        return self.leave(scan(self.decoder, self._placed(self.grow(z))))

    def __call__(self, x: jax.Array, key: jax.Array) -> Any:
        posterior = self.encode(x)
        return self.decode(posterior.sample(key)), posterior


class TokenCodec(nnx.Module):
    """A token autoencoder in the place of `Pca`: weights in, latents with spread 1 out, and back.

    `mean`, `std` (of the weights) and `scale` (of the latents) are fitted; the rest is trained.
    """

    def __init__(self, cfg: TokenVaeConfig, *, rngs: nnx.Rngs):
        sizes = {"token": cfg.tokens, "weight": cfg.length}
        self.mean, self.std = (param("token weight", sizes, zeros, rngs) for _ in range(2))
        self.scale = param("", sizes, zeros, rngs)
        self.vae = TokenVae(cfg, rngs=rngs)

    def normalise(self, tokens: jax.Array) -> jax.Array:
        return (tokens - self.mean[...]) / self.std[...]

    def encode(self, tokens: jax.Array) -> jax.Array:
        return self.vae.encode(self.normalise(tokens)).mean / self.scale[...]

    def decode(self, latents: jax.Array) -> jax.Array:
        return self.vae.decode(latents * self.scale[...]) * self.std[...] + self.mean[...]

    def __call__(self, tokens: jax.Array, key: jax.Array) -> Any:
        """Normalised tokens, their reconstruction from a drawn latent, and the posterior: what `vae_loss` takes."""
        x = self.normalise(tokens)
        return x, *self.vae(x, key)


def vae_loss(
    x: jax.Array, back: jax.Array, posterior: Moments, *, beta: float = 1e-6, squared: float = 1000.0
) -> jax.Array:
    """Compute summed L1 + beta KL, means over the batch, + `squared` times the mean squared error (nats).

    The released log-variance of the L1 term is left out: its optimizer never sees it, so it stays at 0 and changes
    nothing.
    """
    l1 = jnp.abs(x - back).reshape(len(x), -1).sum(1).mean()
    return l1 + beta * posterior.kl().mean() + squared * jnp.square(x - back).mean()


Code = Callable[[np.ndarray, np.ndarray], tuple[ArrayLike, ArrayLike]]
"""`code(tokens, rows)`: the codec's input for the tokens of these zoo networks, and its output."""


@dataclass(frozen=True)
class Gate:
    """Whether a codec may be used: accuracies before and after a round trip (NaN: unknown), and relative error.

    The error is squared, of what is coded. A codec that codes nothing must not pass, hence its limit; networks at
    chance have nothing to lose and do not count.
    """

    before: float
    after: float
    error: float
    tolerance: float
    chance: float = 0.0
    limit: float = float("inf")

    @classmethod
    def of(
        cls,
        before: np.ndarray | float,
        after: np.ndarray | float,
        *,
        given: np.ndarray,
        back: np.ndarray,
        tolerance: float,
        **limits: float,
    ) -> "Gate":
        """Build it from accuracies [n] of networks before and after, and the codec's input and output."""
        means = {"before": float(np.mean(before)), "after": float(np.mean(after))}
        return cls(**means, error=relative_error(given, back), tolerance=tolerance, **limits)

    @property
    def fault(self) -> str:
        """The reason not to use the codec, and what to do; empty when it may be used."""
        skip = "or skip this check with --gate.force"
        if self.before - self.chance <= self.tolerance:
            chance = f"{100 * self.before:.1f} % right, {100 * self.chance:.1f} % by guessing"
            return f"the zoo's networks are at chance: {chance}, so the codec cannot be judged. Train longer, {skip}"
        if self.before - self.after > self.tolerance:
            lost = f"{100 * self.before:.1f} % before, {100 * self.after:.1f} % after a round trip"
            limit = f"relative error {self.error:.3f}, at most {100 * self.tolerance:g} points may go"
            return f"the codec loses accuracy: {lost} ({limit}). Use more latents, {skip}"
        if not self.error <= self.limit:  # NaN is a fault, too
            lost = f"relative error {self.error:.3f}, at most {self.limit:g} (gate.error)"
            return f"the codec loses the weights it is to code: {lost}. Use more latents, {skip}"
        return ""

    def check(self, force: bool = False) -> None:
        """Raise InputError for a fault, unless `force`."""
        if self.fault and not force:
            raise InputError(self.fault)


def relative_error(weights: np.ndarray, back: np.ndarray) -> float:
    """Compute the squared error over the squared spread around the mean network. Both [n, ...]."""
    return float(np.sum((weights - back) ** 2) / max(np.sum((weights - weights.mean(0)) ** 2), 1e-30))


@dataclass(frozen=True)
class GateConfig:
    """The codec must keep the weights and the accuracy of their networks, or training stops before it starts."""

    tolerance: float = 0.02
    """Accuracy that may be lost, on pictures no network of the zoo was trained on; they must have more than that above
    chance.
    """
    error: float = 0.5
    """Relative squared error of what is coded (with a linear prior, of its residual), at most. Heads lost 5 points of
    accuracy at 0.42 and none at 0.23.
    """
    force: bool = False
    members: int = 200
    """Networks of the zoo it is measured on: the last ones, at most a fifth, which the codec is not fitted on. Imported
    checkpoints have no pictures and may all differ: with them only the error is measured, on the networks the codec was
    fitted on.
    """

    def __post_init__(self) -> None:
        between(self, "tolerance", "error", "members")


def left_out(cfg: GateConfig, zoo: Zoo) -> int:
    """Count the last networks of the zoo that only the gate uses."""
    return min(cfg.members, len(zoo) // 5) if zoo.net else 0


def measure(cfg: GateConfig, zoo: Zoo, bank: Bank, code: Code, seed: int) -> None:
    """Run the gate. Raises InputError when it is not passed."""
    held = left_out(cfg, zoo)
    rows = np.arange(len(zoo))[-held:] if held else np.random.default_rng(seed).permutation(len(zoo))[: cfg.members]
    rows, before, after, chance = np.sort(rows), np.nan, np.nan, 0.0
    tokens = zoo.tokens(rows)
    given, back = (np.asarray(x) for x in code(tokens, rows))
    if zoo.net:
        x, y = bank.all(np.asarray(zoo.classes[rows]), 20)
        x = network_inputs(zoo.net, x)
        nets = [zoo.spec.unflatten(jnp.asarray(t), zoo.spec.like) for t in (tokens, tokens - given + back)]
        scored = (accuracy(predict(zoo.net, params, x, at_once=20), y, zoo.net.classes) for params in nets)
        before, after = (right.mean() for right in scored)
        chance = 1 / zoo.net.classes
    coded: dict[str, Any] = dict(given=flat(zoo.spec, given), back=flat(zoo.spec, back))
    found = Gate.of(before, after, **coded, tolerance=cfg.tolerance, chance=chance, limit=cfg.error)
    known = "accuracy is not known"
    if zoo.net:
        known = f"{100 * found.before:.1f} % before, {100 * found.after:.1f} % after a round trip"
    networks = f"{len(rows)} networks{' it was not fitted on' if held else ''}"
    print(f"codec: {known}, relative error {found.error:.4f}, of {networks}")
    found.check(cfg.force)


def check_codec(cfg: TokenVaeConfig, zoo: Zoo, path: str) -> None:
    """Raise InputError for a codec of other networks than the zoo's."""
    own, ours = (cfg.tokens, cfg.length), (zoo.spec.rows, zoo.spec.length)
    if own != ours:
        sizes = "codes {} tokens of {} weights, the zoo's networks have {} of {}".format(*own, *ours)
        raise InputError(f"{path} {sizes}: train another")

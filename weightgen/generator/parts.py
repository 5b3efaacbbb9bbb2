"""Recipes of a generator's parts: a codec in the place of PCA, and an encoder of data sets. Each writes a folder that it names."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.config import to_json
from heirloom.common.errors import positive
from heirloom.common.nn.functional import functional
from heirloom.common.train.loop import Run
from heirloom.common.train.parameters import gathered, save_params
from weightgen.codec import GateConfig, TokenCodec, TokenVaeConfig, check_codec, fit_pca, left_out, measure, tensor_scale, vae_loss
from weightgen.formats import CODEC, ENCODER, open_part
from weightgen.generator.conditions import LEARNED_POINTS, SetConfig
from weightgen.generator.contrast import Aligned, Loss, unit
from weightgen.tokens import Order
from weightgen.train import BaseRecipe, LoopConfig, begin, fit, placed
from weightgen.zoo.data import Bank
from weightgen.zoo.zoo import Zoo, flat, open_with_bank, open_zoo, pictures_of


@dataclass(frozen=True)
class CodecRecipe(BaseRecipe):
    """A token autoencoder in place of PCA, trained on the normalised tokens of a zoo."""

    zoo: str = "runs/zoo/zoo"
    latent: int = 16
    width: int = 64
    layers: int = 2
    normalise: Literal["none", "tensor"] = "tensor"
    """tensor: weights are standardised, by tensor."""
    beta: float = 1e-4
    """Weight of the KL."""
    gate: GateConfig = field(default_factory=lambda: GateConfig(force=True))
    """Measured only: the generator that takes the codec refuses it."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def train(self, directory: Path) -> None:
        run, mesh = Run.open(directory, to_json(self)), begin(self.loop)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        zoo, _ = open_with_bank(Path(self.zoo))
        bank, cfg = pictures_of(self.zoo), self._config(zoo)
        model = functional(TokenCodec, cfg)
        shown_to = len(zoo) - left_out(self.gate, zoo)
        some = zoo.tokens(slice(0, min(4000, shown_to)))
        fitted = {"mean": np.zeros(some.shape[1:], np.float32), "std": np.ones(some.shape[1:], np.float32), "scale": np.float32(1)}
        if self.normalise == "tensor":
            fitted["mean"], fitted["std"] = tensor_scale(zoo.spec, some)
        mask = jnp.asarray(zoo.spec.mask)

        def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {"tokens": zoo.tokens(np.sort(rng.integers(shown_to, size=self.loop.batch)))}

        def value(params: Any, batch: Any, key: jax.Array, frozen: Any) -> Any:
            x, back, posterior = model.apply(params, batch["tokens"], key)
            return vae_loss(jnp.where(mask, x, 0), jnp.where(mask, back, 0), posterior, beta=self.beta), {}

        def save(params: Any) -> None:
            params = {path: gathered(value) for path, value in params.items()}
            encode = jax.jit(partial(model.apply, method="encode"))
            params = params | {"scale": encode(params, some).std()}

            def code(tokens: np.ndarray, rows: np.ndarray) -> Any:
                return tokens, model.apply(params, encode(params, tokens), method="decode")

            measure(self.gate, zoo, bank, code=code, seed=self.loop.seed)
            save_params(run.model, CODEC.name, cfg, params=params, companions=lambda folder: None, force=True)

        fit(
            run,
            self.loop,
            mesh,
            spec=model.spec,
            init=lambda: model.init(jax.random.key(self.loop.seed)) | {name: jnp.asarray(x) for name, x in fitted.items()},
            loss=value,
            data=placed(make, mesh, self.loop.seed),
            frozen=tuple(fitted),
            save=save,
        )

    def _config(self, zoo: Zoo) -> TokenVaeConfig:
        order: Order = "exchangeable" if zoo.net and zoo.net.kind == "head" else "ordered"
        return TokenVaeConfig(
            tokens=zoo.spec.rows,
            length=zoo.spec.length,
            latent=self.latent,
            width=self.width,
            layers=self.layers,
            normalise=self.normalise,
            order=order,
        )

    def describe(self) -> Any:
        return CODEC, self._config(open_zoo(Path(self.zoo)))


@dataclass(frozen=True)
class EncoderRecipe(BaseRecipe):
    """Align a data-set encoder with the latents of the networks trained on the data."""

    zoo: str = "runs/zoo/zoo"
    loss: Loss = "info_nce"
    """soft_target: as released; info_nce, siglip: normalised, their temperature or scale and bias learned."""
    shots: int = 5
    codec: str = ""
    """RUN/model of a codec recipe, whose latents are the frozen side; none: PCA of whole networks."""
    latent: int = 64
    """Components of that PCA."""
    encoder: SetConfig = field(default_factory=lambda: SetConfig(features=64, hidden=64, out=64))
    """Its latent becomes that of the frozen side, its features those of the zoo's pictures."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        positive(self, "shots", "latent")

    def train(self, directory: Path) -> None:
        run, mesh = Run.open(directory, to_json(self)), begin(self.loop)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        zoo, bank = open_with_bank(Path(self.zoo))
        latents = self._latents(zoo)
        cfg = replace(self.encoder, features=bank.features.shape[1], latent=latents(zoo.tokens(slice(0, 1))).shape[1])
        model = functional(lambda cfg, rngs: Aligned(cfg, self.loss, rngs=rngs), cfg)

        def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
            rows = np.sort(rng.integers(len(zoo), size=self.loop.batch))
            return {"w": latents(zoo.tokens(rows)), "support": bank.draw(np.asarray(zoo.classes[rows]), self.shots, rng)}

        def value(params: Any, batch: Any, key: jax.Array, frozen: Any) -> Any:
            data = model.apply(params, batch["support"])
            hit = (unit(batch["w"]) @ unit(data).T).argmax(1) == jnp.arange(len(data))
            return model.apply(params, batch["w"], data, method="nats"), {"retrieved": (hit.sum(), len(data))}

        def save(params: Any) -> None:
            own = {path.removeprefix("encoder/"): x for path, x in params.items() if path.startswith("encoder/")}
            save_params(run.model, ENCODER.name, cfg, params=own, companions=lambda folder: None, force=True)

        fit(
            run,
            self.loop,
            mesh,
            spec=model.spec,
            init=lambda: model.init(jax.random.key(self.loop.seed)),
            loss=value,
            data=placed(make, mesh, self.loop.seed),
            no_decay=LEARNED_POINTS,
            save=save,
        )

    def _latents(self, zoo: Zoo) -> Callable[[np.ndarray], np.ndarray]:
        """Tokens to [member, latent], the side that is not trained."""
        if self.codec:
            cfg, params = open_part(self.codec, CODEC, "weightgen/codec")
            check_codec(cfg, zoo, self.codec)
            encode = jax.jit(partial(functional(TokenCodec, cfg).apply, params, method="encode"))
            return lambda tokens: np.asarray(encode(tokens)).reshape(len(tokens), -1)
        pca = fit_pca(np.asarray(zoo.weights[:4000]), self.latent)
        return lambda tokens: ((flat(zoo.spec, tokens) - pca.mean) @ pca.components / pca.scale).astype(np.float32)

    def describe(self) -> Any:
        return ENCODER, replace(self.encoder, features=Bank.load(Path(self.zoo)).features.shape[1], latent=self.latent)

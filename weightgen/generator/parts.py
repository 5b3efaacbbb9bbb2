"""Recipes of a generator's parts: a codec instead of PCA, and an encoder of data sets; each writes a folder."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import copy
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.errors import between, positive
from heirloom.common.nn.functional import functional
from heirloom.common.nn.norm import unit
from heirloom.common.processes import gathered
from heirloom.common.train.parts import Parts
from heirloom.common.train.step import Batch, LossOutput, Params
from weightgen.codec import (
    GateConfig,
    TokenCodec,
    TokenVaeConfig,
    check_codec,
    fit_pca,
    left_out,
    measure,
    tensor_scale,
    vae_loss,
)
from weightgen.formats import CODEC, ENCODER, open_part
from weightgen.generator.conditions import LEARNED_POINTS, SetConfig
from weightgen.generator.contrast import Aligned, Loss
from weightgen.tokens import Order
from weightgen.train import LoopConfig, optimizer, rows_parts
from weightgen.zoo.data import FEATURES
from weightgen.zoo.zoo import Zoo, flat, open_with_bank, pictures_of, zoo_folder


@dataclass(frozen=True, kw_only=True)
class CodecRecipe(LoopConfig):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "latent", "width", "layers")
        between(self, "beta")

    def parts(self) -> Parts:
        zoo, _ = open_with_bank(zoo_folder(self.zoo))
        bank, cfg = pictures_of(self.zoo), self._config(zoo)
        model, mask = functional(TokenCodec, cfg), jnp.asarray(zoo.spec.mask)
        shown_to = len(zoo) - left_out(self.gate, zoo)
        some = zoo.tokens(slice(0, min(4000, shown_to)))
        shape = some.shape[1:]
        fitted = {"mean": np.zeros(shape, np.float32), "std": np.ones(shape, np.float32), "scale": np.float32(1)}
        if self.normalise == "tensor":
            fitted["mean"], fitted["std"] = tensor_scale(zoo.spec, some)

        def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {"tokens": zoo.tokens(np.sort(rng.integers(shown_to, size=self.batch)))}

        def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
            x, back, posterior = model.apply(params, batch["tokens"], key)
            return vae_loss(jnp.where(mask, x, 0), jnp.where(mask, back, 0), posterior, beta=self.beta), {}

        def final(params: Any) -> dict[str, Any]:
            params = {path: gathered(value) for path, value in params.items()}
            encode = jax.jit(partial(model.apply, method="encode"))
            params = params | {"scale": encode(params, some).std()}

            def code(tokens: np.ndarray, rows: np.ndarray) -> Any:
                return tokens, model.apply(params, encode(params, tokens), method="decode")

            measure(self.gate, zoo, bank, code=code, seed=self.seed)
            return params

        return rows_parts(
            self,
            make,
            loss,
            zoo,
            family=CODEC,
            student=cfg,
            model=model,
            prepare=lambda params: params | {name: jnp.asarray(x) for name, x in fitted.items()},
            optimizer=lambda spec, steps: optimizer(self, spec, steps, frozen=tuple(fitted)),
            final=final,
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


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe(LoopConfig):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "shots", "latent")

    def parts(self) -> Parts:
        zoo, bank = open_with_bank(zoo_folder(self.zoo))
        latents = self._latents(zoo)
        cfg = replace(self.encoder, features=bank.features.shape[1], latent=latents(zoo.tokens(slice(0, 1))).shape[1])
        model = functional(lambda cfg, rngs: Aligned(cfg, self.loss, rngs=rngs), cfg)

        def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
            rows = np.sort(rng.integers(len(zoo), size=self.batch))
            support = bank.draw(np.asarray(zoo.classes[rows]), self.shots, rng)
            return {"w": latents(zoo.tokens(rows)), "support": support}

        def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
            data = model.apply(params, batch["support"])
            hit = (unit(batch["w"]) @ unit(data).T).argmax(1) == jnp.arange(len(data))
            return model.apply(params, batch["w"], data, method="nats"), {"retrieved": (hit.sum(), len(data))}

        def sidecars(opened: Any, out: Path) -> None:
            if (file := zoo_folder(self.zoo) / FEATURES).is_file():  # what it reads, see `check_features`
                copy(file, out / FEATURES)

        return rows_parts(
            self,
            make,
            loss,
            zoo,
            sidecars=sidecars,
            family=ENCODER,
            student=cfg,
            model=model,
            optimizer=lambda spec, steps: optimizer(self, spec, steps, no_decay=LEARNED_POINTS),
            # The temperature of the contrastive loss is not part of the encoder.
            final=lambda params: {
                path.removeprefix("encoder/"): x for path, x in params.items() if path.startswith("encoder/")
            },
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

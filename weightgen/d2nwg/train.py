"""The recipe of the release: first the autoencoder of weight vectors, then diffusion of its latents (see `model`)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.processes import gathered
from heirloom.common.train import recipe
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parameters import best
from heirloom.common.train.parts import Opened, Parts
from heirloom.common.train.step import Batch, LossOutput, Params, StepConfig
from weightgen.codec import GateConfig, left_out, measure
from weightgen.d2nwg.model import D2nwg, D2nwgConfig, latent_scale, stage1_loss, stage2_loss
from weightgen.d2nwg.unet import UnetConfig
from weightgen.d2nwg.vae import VaeConfig
from weightgen.formats import D2NWG, save_neighbours
from weightgen.generator.conditions import LEARNED_POINTS, SetConfig
from weightgen.train import LoopConfig, check_batch, generator_rows, optimizer, rows_parts
from weightgen.zoo.data import Bank, Projection
from weightgen.zoo.zoo import Zoo, flat, open_with_bank, pictures_of, zoo_folder

# Adam without schedule for the autoencoder; plain AdamW with a long warm-up for the UNet and the condition, which
# decays biases and norms as well. Samples are not drawn from an average.
ADAM = OptimConfig(lr=1.115e-3, warmup=1, schedule="constant", b1=0.5, b2=0.9, eps=1e-8, weight_decay=0.0, clip=None)
ADAMW = OptimConfig(
    lr=1.133e-4,
    warmup=10_000,
    schedule="constant",
    b2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    decay=("unet/**", "condition/**"),
    clip=None,
)


@dataclass(frozen=True)
class Stage1Config:
    """The first of two stages: the autoencoder of weight vectors."""

    steps: int = 50_000
    batch: int = 64
    optim: OptimConfig = ADAM
    step: StepConfig = field(default_factory=StepConfig)

    def __post_init__(self) -> None:
        positive(self, "steps", "batch")


@dataclass(frozen=True, kw_only=True)
class D2nwgRecipe(LoopConfig):
    """D2NWG as released, on a zoo trained from pictures; `RUN/model` is what `heirloom generate` takes.

    Deviation: both stages take a number of steps and keep the last state; the release takes epochs (3,000 and 1,000 at
    most) and keeps the state with the lowest loss. The warm-up begins at 1 / 10,000 of the rate, where the release
    begins at a millionth. Pictures of a condition are drawn from all of a class, where the release draws from its first
    20.
    """

    zoo: str = "runs/zoo/zoo"
    vae: VaeConfig = field(default_factory=VaeConfig)
    """Its length becomes the number of weights of the zoo's networks."""
    unet: UnetConfig = field(default_factory=UnetConfig)
    encoder: Literal["mlp", "set"] = "mlp"
    features: SetConfig = field(default_factory=SetConfig)
    """Of the Set Transformers; the features become those of the zoo's pictures."""
    scale: float = 1.0
    """Weights are divided by this: 1 for small CNNs, 0.125 for ResNets."""
    shots: int = 5
    beta: float = 1e-6
    """Weight of the KL."""
    chain: int = 1024
    """Steps of the diffusion, all of which are taken to draw."""
    gate: GateConfig = field(default_factory=GateConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    """The training of the autoencoder."""
    batch: int = 64
    optim: OptimConfig = ADAMW
    step: StepConfig = field(default_factory=StepConfig)
    steps: int = 100_000
    """Steps of the diffusion's training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "shots", "chain")
        between(self, "scale", least=1e-6)
        between(self, "beta")

    def former(self) -> dict[str, str]:
        return {"stage2.": ""}

    def check(self, mesh: Mesh) -> None:
        check_batch(self.batch, self.step, mesh)
        check_batch(self.stage1.batch, self.stage1.step, mesh, name="stage1.batch")

    def config(self, zoo: Zoo, bank: Bank) -> D2nwgConfig:
        if zoo.net is None:
            raise InputError(f"{self.zoo} is of checkpoints, without pictures: use heirloom train weightgen/generator")
        features = replace(self.features, features=bank.features.shape[1])
        vae = replace(self.vae, length=-(-zoo.spec.count // self.vae.rows))
        slots = self.shots * zoo.classes.shape[1]
        return D2nwgConfig(
            vae=vae,
            unet=self.unet,
            encoder=self.encoder,
            features=features,
            slots=slots,
            scale=self.scale,
            steps=self.chain,
            net=zoo.net,
            shots=self.shots,
        )

    def parts(self) -> Parts:
        """Diffusion of the latents of an autoencoder that is trained first (`RUN/stage_1`)."""
        folder = zoo_folder(self.zoo)
        zoo, bank = open_with_bank(folder)
        cfg = self.config(zoo, bank)
        model, make = functional(D2nwg, cfg), generator_rows(zoo, bank, self.shots, self.batch)

        def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
            tokens = batch["tokens"][:, zoo.spec.mask]
            vector = jnp.pad(tokens, ((0, 0), (0, cfg.vae.rows * cfg.vae.length - tokens.shape[1])))
            # All pictures count: the released encoders are always given as many.
            given = dict(params=params, weights=vector, support=batch["support"], key=key)
            return stage2_loss(model, cfg, params["k"], **given), {}

        def sidecars(opened: Opened, out: Path) -> None:
            save_neighbours(out, zoo, self.seed, bank=bank)
            Projection.load(folder).save(out)

        return rows_parts(
            self,
            make,
            loss,
            zoo,
            family=D2NWG,
            student=cfg,
            model=model,
            start=lambda opened, place: self._after_stage1(model, cfg, zoo, opened.directory),
            optimizer=lambda spec, steps: optimizer(self, spec, steps, frozen=("k", "vae/**"), no_decay=self._points),
            sidecars=sidecars,
        )

    @property
    def _points(self) -> tuple[str, ...]:
        return LEARNED_POINTS if self.encoder == "set" else ()

    def _after_stage1(self, model: Functional, cfg: D2nwgConfig, zoo: Zoo, directory: Path) -> dict[str, jax.Array]:
        """Train the autoencoder in its own run; returns all parameters. Raises InputError if the gate fails."""
        one = self.stage1
        first = replace(self, steps=one.steps, batch=one.batch, optim=one.optim, step=one.step)
        shown_to = len(zoo) - left_out(self.gate, zoo)

        def vectors(tokens: np.ndarray) -> np.ndarray:
            weights = flat(zoo.spec, tokens)
            return np.pad(weights, ((0, 0), (0, cfg.vae.rows * cfg.vae.length - weights.shape[1])))

        def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {"weights": vectors(zoo.tokens(np.sort(rng.integers(shown_to, size=first.batch))))}

        def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
            return stage1_loss(model, cfg, params, weights=batch["weights"], key=key, beta=self.beta), {}

        parts = rows_parts(
            first,
            make,
            loss,
            zoo,
            family=D2NWG,
            student=cfg,
            model=model,
            prepare=lambda params: params | {"k": jnp.float32(1)},
            optimizer=lambda spec, steps: optimizer(
                first, spec, steps, frozen=("k", "unet/**", "condition/**"), no_decay=self._points
            ),
        )
        session = recipe.begin(first, directory / "stage_1", parts)
        assert session is not None  # without a model folder a run is not finished
        state = recipe.train(session, parts, finish=lambda state: None)
        autoencoder = {path: jnp.asarray(gathered(value)) for path, value in best(state).items()}
        mean = jax.jit(lambda x: model.apply(autoencoder, x, method="code"))

        def code(tokens: np.ndarray, rows: np.ndarray) -> Any:
            return tokens, zoo.spec.padded(np.asarray(mean(vectors(tokens)))[:, : zoo.spec.count])

        measure(self.gate, zoo, pictures_of(self.zoo), code=code, seed=self.seed)
        shown = np.random.default_rng([self.seed, 0]).integers(shown_to, size=first.batch)
        some = jnp.asarray(vectors(zoo.tokens(np.sort(shown))))
        return autoencoder | {"k": latent_scale(model, autoencoder, some, key=jax.random.key(self.seed))}

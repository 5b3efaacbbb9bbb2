"""The recipe of the release: first the autoencoder of weight vectors, then diffusion of its latents (see `model`)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.config import to_json
from heirloom.common.errors import InputError, positive
from heirloom.common.nn.functional import functional
from heirloom.common.train.loop import Run
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parameters import gathered, save_params
from heirloom.common.train.step import StepConfig
from weightgen.codec import GateConfig, left_out, measure
from weightgen.d2nwg.model import D2nwg, D2nwgConfig, latent_scale, stage1_loss, stage2_loss
from weightgen.d2nwg.unet import UnetConfig
from weightgen.d2nwg.vae import VaeConfig
from weightgen.formats import D2NWG, save_neighbours
from weightgen.generator.conditions import LEARNED_POINTS, SetConfig
from weightgen.train import BaseRecipe, LoopConfig, begin, check_batch, fit, generator_batches, placed
from weightgen.zoo.data import Bank, Projection
from weightgen.zoo.zoo import Zoo, flat, open_with_bank, open_zoo, pictures_of

# Adam without schedule for the autoencoder; plain AdamW with a long warm-up for the UNet and the condition, which decays biases and norms
# as well. Samples are not drawn from an average.
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
class D2nwgRecipe(BaseRecipe):
    """D2NWG as released, on a zoo trained from pictures; `RUN/model` is what `heirloom generate` takes.

    Deviation: both stages take a number of steps and keep the last state; the release takes epochs (3,000 and 1,000 at most) and keeps the
    state with the lowest loss. The warm-up begins at 1 / 10,000 of the rate, where the release begins at a millionth. Pictures of a
    condition are drawn from all of a class, where the release draws from its first 20.
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
    stage1: LoopConfig = field(default_factory=lambda: LoopConfig(steps=50_000, batch=64, optim=ADAM, step=StepConfig()))
    stage2: LoopConfig = field(default_factory=lambda: LoopConfig(steps=100_000, batch=64, optim=ADAMW, step=StepConfig()))

    def __post_init__(self) -> None:
        positive(self, "shots", "chain")
        if self.stage1.mesh != self.stage2.mesh:
            raise InputError("stage1.mesh and stage2.mesh differ: both stages run on one mesh, give the two the same sizes")

    def config(self, zoo: Zoo, bank: Bank) -> D2nwgConfig:
        if zoo.net is None:
            raise InputError(f"{self.zoo} is of imported checkpoints, without pictures: heirloom train weightgen/generator takes them")
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

    def train(self, directory: Path) -> None:
        run, folder, mesh = Run.open(directory, to_json(self)), Path(self.zoo), begin(self.stage1)
        check_batch(self.stage2, mesh)
        if run.finished(self.stage2.steps):
            print(f"{directory} is finished: {run.model}")
            return
        zoo, bank = open_with_bank(folder)
        cfg = self.config(zoo, bank)
        model = functional(D2nwg, cfg)
        points = LEARNED_POINTS if self.encoder == "set" else ()
        fresh = model.init(jax.random.key(self.stage1.seed)) | {"k": jnp.float32(1)}

        def vectors(tokens: np.ndarray) -> np.ndarray:
            weights = flat(zoo.spec, tokens)
            return np.pad(weights, ((0, 0), (0, cfg.vae.rows * cfg.vae.length - weights.shape[1])))

        shown_to = len(zoo) - left_out(self.gate, zoo)

        def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {"weights": vectors(zoo.tokens(np.sort(rng.integers(shown_to, size=self.stage1.batch))))}

        autoencoder = fit(
            Run.open(directory / "stage_1", to_json(self)),
            self.stage1,
            mesh,
            spec=model.spec,
            init=lambda: fresh,
            loss=lambda params, batch, key, frozen: (
                stage1_loss(model, cfg, params, weights=batch["weights"], key=key, beta=self.beta),
                {},
            ),
            data=placed(weights, mesh, self.stage1.seed),
            frozen=("k", "unet/**", "condition/**"),
            no_decay=points,
        )
        autoencoder = {path: jnp.asarray(gathered(value)) for path, value in autoencoder.items()}
        mean = jax.jit(lambda x: model.apply(autoencoder, x, method="code"))

        def code(tokens: np.ndarray, rows: np.ndarray) -> Any:
            return tokens, zoo.spec.padded(np.asarray(mean(vectors(tokens)))[:, : zoo.spec.count])

        measure(self.gate, zoo, pictures_of(self.zoo), code=code, seed=self.stage1.seed)
        first = weights(np.random.default_rng([self.stage2.seed, 0]))["weights"]
        params = autoencoder | {"k": latent_scale(model, autoencoder, jnp.asarray(first), key=jax.random.key(self.stage2.seed))}
        batches = generator_batches(zoo, bank, self.shots, cfg=self.stage2, mesh=mesh)

        def value(params: Any, batch: Any, key: jax.Array, frozen: Any) -> Any:
            tokens = batch["tokens"][:, zoo.spec.mask]
            vector = jnp.pad(tokens, ((0, 0), (0, cfg.vae.rows * cfg.vae.length - tokens.shape[1])))
            # All pictures count: the released encoders are always given as many.
            return stage2_loss(model, cfg, params["k"], params=params, weights=vector, support=batch["support"], key=key), {}

        def sidecars(out: Path) -> None:
            save_neighbours(out, zoo, self.stage2.seed, bank=bank)
            Projection.load(folder).save(out)

        fit(
            run,
            self.stage2,
            mesh,
            spec=model.spec,
            init=lambda: params,
            loss=value,
            data=batches,
            frozen=("k", "vae/**"),
            save=lambda params: save_params(run.model, D2NWG.name, cfg, params=params, companions=sidecars, force=True),
        )

    def describe(self) -> Any:
        return D2NWG, self.config(open_zoo(Path(self.zoo)), Bank.load(Path(self.zoo)))

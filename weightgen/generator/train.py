"""Training of a generator, in memory and as a recipe: prior and codec, the gate, then diffusion."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copy
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.weights import of_run
from heirloom.common.errors import InputError, between, positive, remark
from heirloom.common.nn.functional import Functional, Params, functional
from heirloom.common.train.parts import Parts
from weightgen.codec import GateConfig, check_codec, left_out, measure
from weightgen.formats import CODEC, ENCODER, GENERATOR, open_part, save_neighbours
from weightgen.generator.conditions import LEARNED_POINTS
from weightgen.generator.config import ConditionKind, GeneratorConfig
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.generator.loss import loss
from weightgen.generator.model import Generator, fit_stage1
from weightgen.train import LoopConfig, generator_rows, optimizer, rows_parts
from weightgen.zoo.data import FEATURES, Bank, Projection
from weightgen.zoo.zoo import Zoo, open_with_bank, pictures_of, zoo_condition, zoo_folder

ALIGNED = ("intra/", "inter/")  # the parts of an encoder that a generator takes over


def generator_parts(
    cfg: GeneratorConfig,
    zoo: Zoo,
    bank: Bank,
    *,
    loop: LoopConfig,
    dropout: float = 0.1,
    initial: Callable[[], Params] | None = None,
    frozen: tuple[str, ...] = (),
    sidecars: Callable[[Path], None] = lambda folder: None,
) -> Parts:
    """Diffusion of a zoo's networks.

    dropout: probability with which the condition is left out, for guidance. initial: the parameters to begin with; by
    default fresh ones with prior and PCA fitted. frozen: path patterns that are not updated, in addition to the fitted
    ones.
    """
    model, make = functional(Generator, cfg), generator_rows(zoo, bank, cfg.shots, loop.batch)
    first = initial or (lambda: initial_params(model, fit_stage1(cfg, zoo, bank, seed=loop.seed), loop.seed))
    no_decay = LEARNED_POINTS if cfg.condition == "set" else ()
    return rows_parts(
        loop,
        make,
        loss(model, cfg, dropout),
        zoo,
        family=GENERATOR,
        student=cfg,
        model=model,
        start=lambda opened, place: first(),
        optimizer=lambda spec, steps: optimizer(loop, spec, steps, frozen=(*cfg.fitted, *frozen), no_decay=no_decay),
        sidecars=lambda opened, folder: sidecars(folder),
    )


def check_features(encoder: Path, zoo: Path) -> None:
    """Refuses an encoder that was trained on features of another zoo: each zoo has its own PCA of pictures."""
    if not all((folder / FEATURES).is_file() for folder in (encoder, zoo)):
        remark(f"{encoder} does not say which features it reads; those of {zoo} are assumed to be the same")
        return
    one, other = Projection.load(encoder), Projection.load(zoo)
    same = one.backend == other.backend and one.components.shape == other.components.shape
    if not (same and np.allclose(one.components, other.components) and np.allclose(one.mean, other.mean)):
        raise InputError(f"{encoder} was trained on features of other pictures than those of {zoo}: train one on it")


def initial_params(model: Functional, fitted: Mapping[str, np.ndarray], seed: int) -> Params:
    """Fresh parameters with the fitted ones in place."""
    return model.init(jax.random.key(seed)) | {path: jnp.asarray(value) for path, value in fitted.items()}


@dataclass(frozen=True, kw_only=True)
class GeneratorRecipe(LoopConfig):
    """Prior and codec, the gate, then diffusion; `RUN/model` is what `heirloom generate` takes."""

    zoo: str = "runs/zoo/zoo"
    latent: int = 48
    """Numbers a token is coded in by PCA."""
    codec: str = ""
    """RUN/model of a codec recipe in the place of PCA."""
    condition: ConditionKind = "per_class"
    """per_class, set, mlp: by pictures; text, label, chunk: for zoos of imported checkpoints."""
    encoder: str = ""
    """RUN/model of an encoder recipe, for the condition set: both Set Transformers are taken from it and kept."""
    prior: Literal["none", "linear"] = "linear"
    schedule: Literal["linear", "scaled_linear"] = "linear"
    shots: int = 5
    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig(width=64, layers=2, heads=4, hidden=128))
    dropout: float = 0.1
    """Probability with which the condition is left out, for guidance."""
    gate: GateConfig = field(default_factory=GateConfig)
    batch: int = 128
    steps: int = 600
    """Optimizer steps of the whole run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "latent", "shots")
        between(self, "dropout", most=1.0)

    def config(self, zoo: Zoo, bank: Bank) -> GeneratorConfig:
        """What the recipe makes of a zoo. Raises InputError when its networks were made for another condition."""
        by = "pictures" if zoo.net else zoo_condition(zoo_folder(self.zoo))
        fits = {"pictures": ("per_class", "set", "mlp"), "text": ("text", "label")}
        fits |= {"label": ("label",), "chunk": ("chunk",)}
        if self.condition not in fits[by]:
            raise InputError(f"{self.zoo} is a zoo conditioned by {by}: set condition to {' or '.join(fits[by])}")
        codec = open_part(self.codec, CODEC, "weightgen/codec")[0] if self.codec else None
        encoder = open_part(self.encoder, ENCODER, "weightgen/encoder")[0] if self.encoder else None
        if codec:
            check_codec(codec, zoo, self.codec)
        if encoder and self.condition != "set":
            raise InputError(f"an encoder is for the condition set, not {self.condition}")
        if encoder and encoder.features != bank.features.shape[1]:
            features = f"{encoder.features} features, {self.zoo} has {bank.features.shape[1]}"
            raise InputError(f"{self.encoder} looks at {features}: train an encoder on it")
        if encoder:
            check_features(of_run(Path(self.encoder).expanduser()), zoo_folder(self.zoo))
        return GeneratorConfig(
            net=zoo.net,
            latent=self.latent,
            condition=self.condition,
            shots=self.shots if zoo.net else 1,
            prior=self.prior,
            denoiser=self.denoiser,
            told=bank.features.shape[1],
            schedule=self.schedule,
            cut=None if zoo.net else zoo.whole or zoo.spec,
            codec=codec,
            encoder=encoder,
            labels=len(bank.names) if self.condition in ("label", "chunk") else 0,
        )

    def parts(self) -> Parts:
        folder = zoo_folder(self.zoo)
        zoo, bank = open_with_bank(folder)
        cfg = self.config(zoo, bank)
        if cfg.condition == "label":
            bank = Bank.numbers(bank.names)

        def sidecars(out: Path) -> None:
            save_neighbours(out, zoo, self.seed, bank=bank)
            for name in (FEATURES, "tasks.json", "adapter.json"):
                if (folder / name).is_file():
                    copy(folder / name, out / name)

        return generator_parts(
            cfg,
            zoo,
            bank,
            loop=self,
            dropout=self.dropout,
            initial=lambda: self.initial(cfg, zoo, bank),
            # As released: of an aligned encoder only the last layer, a fresh one, goes on learning.
            frozen=tuple(f"condition/{part}**" for part in ALIGNED if self.encoder),
            sidecars=sidecars,
        )

    def initial(self, cfg: GeneratorConfig, zoo: Zoo, bank: Bank) -> Params:
        """Fresh parameters with prior and codec fitted. Raises InputError when the codec does not pass the gate."""
        model = functional(Generator, cfg)
        params = initial_params(model, self.fitted(cfg, zoo, bank), self.seed)

        def code(tokens: np.ndarray, rows: np.ndarray) -> Any:
            support = bank.draw(np.asarray(zoo.classes[rows]), cfg.shots, np.random.default_rng(self.seed))
            mask = np.ones(support.shape[:3], bool)
            expected = model.apply(gated, support, mask, method="expected")
            latents = model.apply(gated, tokens, support, mask, method="encode")
            back = model.apply(gated, latents, support, mask, method="decode")
            return tokens - expected, back - expected

        held = left_out(self.gate, zoo)
        gated = params | self.fitted(cfg, zoo.first(len(zoo) - held), bank) if held else params
        measure(self.gate, zoo, pictures_of(self.zoo), code=code, seed=self.seed)
        return params

    def fitted(self, cfg: GeneratorConfig, zoo: Zoo, bank: Bank) -> dict[str, np.ndarray]:
        """Parameters known before training: prior and PCA, or the parts that other recipes trained."""
        fitted = fit_stage1(cfg, zoo, bank, seed=self.seed)
        if self.codec:
            fitted |= {f"codec/{name}": x for name, x in open_part(self.codec, CODEC, "weightgen/codec")[1].items()}
        if self.encoder:
            aligned = open_part(self.encoder, ENCODER, "weightgen/encoder")[1]
            fitted |= {f"condition/{name}": x for name, x in aligned.items() if name.startswith(ALIGNED)}
        return fitted

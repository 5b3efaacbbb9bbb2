"""The recipe of a generator: prior and codec, the gate, then diffusion."""

from dataclasses import dataclass, field
from pathlib import Path
from shutil import copy
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.config import to_json
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.train.loop import Run
from heirloom.common.train.parameters import save_params
from weightgen.codec import GateConfig, check_codec, left_out, measure
from weightgen.formats import CODEC, ENCODER, FAMILY, open_part, save_neighbours
from weightgen.generator.conditions import LEARNED_POINTS
from weightgen.generator.config import GeneratorConfig, Told
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.generator.loss import loss
from weightgen.generator.model import Generator, fit_stage1
from weightgen.train import LoopConfig, Stage, begin, fit, generator_batches
from weightgen.zoo.data import (
    Bank,
)
from weightgen.zoo.zoo import Zoo, open_told, open_zoo, pictures_of, zoo_words

ALIGNED = ("intra/", "inter/")  # the parts of an encoder that a generator takes over


@dataclass(frozen=True)
class GeneratorRecipe(Stage):
    """Prior and codec, the gate, then diffusion; `RUN/model` is what `heirloom generate` takes."""

    zoo: str = "runs/zoo/zoo"
    latent: int = 48
    """Numbers a token is coded in by PCA."""
    codec: str = ""
    """RUN/model of a codec recipe in the place of PCA."""
    condition: Told = "per_class"
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
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=600, batch=128))

    def config(self, zoo: Zoo, bank: Bank) -> GeneratorConfig:
        """What the recipe makes of a zoo. Raises InputError when its condition is not what the zoo's networks were made for."""
        told, given = ("pictures", "pictures") if zoo.net else (zoo_words(Path(self.zoo)), "words")
        fits = {"pictures": ("per_class", "set", "mlp"), "text": ("text", "label"), "label": ("label",), "chunk": ("chunk",)}
        if self.condition not in fits[told]:
            raise InputError(f"{self.zoo} is a zoo told by {told}: set condition to {' or '.join(fits[told])}")
        codec = open_part(self.codec, CODEC, "weightgen/codec")[0] if self.codec else None
        encoder = open_part(self.encoder, ENCODER, "weightgen/encoder")[0] if self.encoder else None
        if codec:
            check_codec(codec, zoo, self.codec)
        if encoder and self.condition != "set":
            raise InputError(f"an encoder is for the condition set, not {self.condition}")
        if encoder and encoder.features != bank.features.shape[1]:
            raise InputError(
                f"{self.encoder} looks at {encoder.features} features, {self.zoo} has {bank.features.shape[1]}: train an encoder on it"
            )
        return GeneratorConfig(
            zoo.net,
            self.latent,
            self.condition,
            1 if given == "words" else self.shots,
            self.prior,
            self.denoiser,
            bank.features.shape[1],
            self.schedule,
            None if zoo.net else zoo.whole or zoo.spec,
            codec,
            encoder,
            len(bank.names) if self.condition in ("label", "chunk") else 0,
        )

    def train(self, directory: Path) -> None:
        run, folder, mesh = Run.open(directory, to_json(self)), Path(self.zoo), begin(self.loop)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        zoo, bank = open_told(folder)
        cfg = self.config(zoo, bank)
        if cfg.condition == "label":
            bank = Bank.numbers(bank.names)
        model = functional(Generator, cfg)
        fitted = self.fitted(cfg, zoo, bank)
        params = model.init(jax.random.key(self.loop.seed)) | {path: jnp.asarray(value) for path, value in fitted.items()}
        # As released: of an aligned encoder only the last layer goes on learning, and is a fresh one.
        frozen = cfg.fitted + tuple(f"condition/{part}**" for part in ALIGNED if self.encoder)

        def code(tokens: np.ndarray, rows: np.ndarray) -> Any:
            support = bank.draw(np.asarray(zoo.classes[rows]), cfg.shots, np.random.default_rng(self.loop.seed))
            there = np.ones(support.shape[:3], bool)
            expected = model.apply(gated, support, there, method="expected")
            back = model.apply(gated, model.apply(gated, tokens, support, there, method="encode"), support, there, method="decode")
            return tokens - expected, back - expected

        held = left_out(self.gate, zoo)
        gated = params | self.fitted(cfg, zoo.first(len(zoo) - held), bank) if held else params
        measure(self.gate, zoo, pictures_of(self.zoo), code, self.loop.seed)

        def beside(out: Path) -> None:
            save_neighbours(out, zoo, self.loop.seed, bank)
            for name in ("features.safetensors", "tasks.json", "adapter.json"):
                if (folder / name).is_file():
                    copy(folder / name, out / name)

        fit(
            run,
            self.loop,
            mesh,
            model.spec,
            lambda: params,
            loss(model, cfg, self.dropout),
            generator_batches(zoo, bank, cfg.shots, self.loop, mesh),
            frozen=frozen,
            no_decay=LEARNED_POINTS if cfg.condition == "set" else (),
            save=lambda params: save_params(run.model, FAMILY.name, cfg, params, beside, force=True),
        )

    def fitted(self, cfg: GeneratorConfig, zoo: Zoo, bank: Bank) -> dict[str, np.ndarray]:
        """What is there before training: prior and PCA, or the parts that other recipes trained."""
        fitted = fit_stage1(cfg, zoo, bank, self.loop.seed)
        if self.codec:
            fitted |= {f"codec/{name}": x for name, x in open_part(self.codec, CODEC, "weightgen/codec")[1].items()}
        if self.encoder:
            aligned = open_part(self.encoder, ENCODER, "weightgen/encoder")[1]
            fitted |= {f"condition/{name}": x for name, x in aligned.items() if name.startswith(ALIGNED)}
        return fitted

    def describe(self) -> Any:
        return FAMILY, self.config(open_zoo(Path(self.zoo)), Bank.load(Path(self.zoo)))

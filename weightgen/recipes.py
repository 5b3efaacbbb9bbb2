"""What `heirloom train` runs: a zoo, a codec, an encoder or a generator. Each writes a folder that the next one names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from common.checkpoint.weights import staged
from common.config import to_json
from common.data.sources import SourceConfig, open_source
from common.errors import InputError
from common.nn.functional import functional
from common.train.loop import Run
from common.train.mesh import start
from common.train.metrics import MetricsFile
from common.train.parameters import save_params
from weightgen import contrast
from weightgen.autoencoder import TokenVae, TokenVaeConfig, vae_loss
from weightgen.codec import fit_pca, gate
from weightgen.conditions import SetConfig, SetOfSets
from weightgen.data import SHARES, Bank, EmojiTasks, Projection, draw_tasks, emoji_tasks, encoder
from weightgen.denoiser import DenoiserConfig
from weightgen.evaluate import accuracy
from weightgen.formats import CODEC, ENCODER, FAMILY
from weightgen.generator import Generator, GeneratorConfig, fit_stage1, loss
from weightgen.nets import NetConfig, net, predict
from weightgen.normalise import Kind, Normaliser
from weightgen.train import LoopConfig, fit, generator_batches, placed
from weightgen.zoo import FitConfig, Zoo, build, flat, head_tokens, open_zoo


class Stage:
    """What the four recipes cannot do, said in one line each."""

    def inherit(self, destination: Path, *, force: bool = False) -> Mapping[str, Any]:
        raise InputError("this recipe inherits from no donor: heirloom train runs it")

    def evaluate(self) -> list[dict[str, Any]]:
        raise InputError("this recipe has nothing to score before it is trained: heirloom train, then heirloom eval RUN/model --data DIR")


@dataclass(frozen=True)
class ZooRecipe(Stage):
    """Train a zoo of heads or MLPs on features, by random tasks."""

    data: str = "emoji"
    """emoji (its CLDR subgroups, some held out), or a folder with a sub-folder of pictures for each class."""
    backend: str = "embedded:emoji"
    """What looks at pictures: a SOURCE with an image tower, or pixels."""
    net: NetConfig = field(default_factory=NetConfig)
    """features: how many components of the backend's features are kept; classes: of a task."""
    start: Literal["shared", "random"] = "shared"
    members: int = 4000
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=60, lr=0.1, weight_decay=0.03))
    pictures: int = 40
    """Pictures of a class a network is trained on, at most."""
    chunk: int = 500
    """Networks trained at once."""
    seed: int = 0

    def train(self, directory: Path) -> None:
        """Write `RUN/zoo`. A run that is stopped goes on at its last finished chunk."""
        if self.net.kind == "cnn":
            raise InputError("a zoo recipe trains on features: net.kind head or mlp (benchmarks/generated_init.py builds zoos of CNNs)")
        run = Run.open(directory, to_json(self))
        if (directory / "zoo").is_dir():
            print(f"{directory} is finished: the zoo is in {directory / 'zoo'}")
            return
        bank, held, projection = self._banks()
        classes = draw_tasks(len(held.names), self.members, self.net.classes, np.random.default_rng(self.seed))
        spec, metrics = head_tokens(self.net), MetricsFile(run.directory / "metrics.jsonl")
        parts = directory / "parts"
        parts.mkdir(exist_ok=True)
        done = sorted(parts.glob("*.npz"))
        metrics.truncate(sum(len(np.load(file)["quality"]) for file in done))
        first = len(done) * self.chunk
        populations = build(
            self.net,
            lambda a, b: bank.all(classes[a:b], self.pictures),
            self.members,
            self.fit,
            start=self.start,
            chunk=self.chunk,
            seed=self.seed,
            first=first,
        )
        for i, params in enumerate(populations, start=len(done)):
            rows = classes[i * self.chunk : (i + 1) * self.chunk]
            x, y = held.all(rows, int(held.counts.max()))
            quality = accuracy(predict(self.net, params, x), y, self.net.classes).astype(np.float32)
            with staged(parts / f"{i:06d}.npz", force=True) as file, file.open("wb") as out:
                np.savez(out, weights=flat(spec, spec.flatten({k: np.asarray(v) for k, v in params.items()})), quality=quality)
            metrics.append(
                {"step": min((i + 1) * self.chunk, self.members), "loss": float(1 - quality.mean()), "accuracy": float(quality.mean())}
            )
            done_now = min((i + 1) * self.chunk, self.members)
            print(f"{done_now:,}/{self.members:,} networks, {100 * quality.mean():.1f} % right on other pictures")
        chunks = [np.load(file) for file in sorted(parts.glob("*.npz"))]
        weights, quality = (np.concatenate([c[name] for c in chunks]) for name in ("weights", "quality"))
        zoo = Zoo(weights, quality, classes, self.net, spec)

        def beside(folder: Path) -> None:
            bank.save(folder)
            projection.save(folder)

        zoo.save(directory / "zoo", beside=beside)
        for file in parts.glob("*.npz"):
            file.unlink()
        parts.rmdir()

    def _banks(self) -> tuple[Bank, Bank, Projection]:
        """Pictures to train on, pictures to score on, and how they became features."""
        if self.data == "emoji":
            tasks: EmojiTasks = emoji_tasks(self.backend, self.net.features, seed=0)
            return tasks.seen["support"], tasks.seen["test"], tasks.projection
        source = open_source(SourceConfig(self.data))
        names = getattr(source, "classes", ())
        if len(names) < self.net.classes:
            raise InputError(f"{self.data} has {len(names)} classes in sub-folders, tasks of {self.net.classes} need as many")
        records = [source[i] for i in range(len(source))]
        labels = np.array([int(r["label"]) for r in records])
        raw = encoder(self.backend)([r["image"] for r in records])
        place = np.concatenate([np.random.default_rng([self.seed, c]).permutation((labels == c).sum()) for c in range(len(names))])
        order = np.argsort(labels, kind="stable")
        held = np.zeros(len(labels), bool)
        held[order] = place < np.maximum(np.rint(SHARES["select"] * np.bincount(labels)[labels[order]]), 1)
        projection = Projection.fit(self.backend, raw[~held], self.net.features)
        x = projection(raw)
        return Bank.of(x[~held], labels[~held], names), Bank.of(x[held], labels[held], names), projection

    def describe(self) -> Any:
        raise InputError("a zoo is no model: heirloom train builds it")


@dataclass(frozen=True)
class GateConfig:
    """The codec must keep the accuracy of the networks it codes, or training stops before it starts."""

    tolerance: float = 0.02
    force: bool = False
    members: int = 200
    """Networks of the zoo it is measured on."""


def measure(cfg: GateConfig, zoo: Zoo, bank: Bank, code: Any, seed: int) -> Any:
    """The gate, on `members` networks of the zoo and the pictures of their classes. code(tokens, rows) -> tokens."""
    assert zoo.net is not None
    rows = np.sort(np.random.default_rng(seed).choice(len(zoo), min(cfg.members, len(zoo)), replace=False))
    tokens, model = zoo.tokens(rows), net(zoo.net)
    back = np.asarray(code(tokens, rows))
    x, y = bank.all(np.asarray(zoo.classes[rows]), 20)
    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in model.spec.items()}
    before, after = (accuracy(predict(zoo.net, zoo.spec.unflatten(jnp.asarray(t), like), x), y, zoo.net.classes) for t in (tokens, back))
    found = gate(before, after, tokens, back, cfg.tolerance)
    print(f"codec: {100 * found.before:.1f} % before, {100 * found.after:.1f} % after a round trip, relative error {found.error:.4f}")
    return found


@dataclass(frozen=True)
class CodecRecipe(Stage):
    """A token autoencoder in place of PCA, trained on the normalised tokens of a zoo."""

    zoo: str = "runs/zoo/zoo"
    latent: int = 16
    width: int = 64
    layers: int = 2
    normalise: Kind = "tensor"
    beta: float = 1e-4
    """Weight of the KL."""
    gate: GateConfig = field(default_factory=lambda: GateConfig(force=True))
    loop: LoopConfig = field(default_factory=LoopConfig)

    def train(self, directory: Path) -> None:
        run, zoo, mesh = Run.open(directory, to_json(self)), open_zoo(Path(self.zoo)), start(self.loop.mesh)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        bank = Bank.load(Path(self.zoo))
        cfg = self._config(zoo)
        model = functional(TokenVae, cfg)
        scaled = Normaliser.fit(self.normalise, zoo.spec, zoo.tokens(slice(0, 4000)))

        def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {"x": scaled(zoo.tokens(np.sort(rng.integers(len(zoo), size=self.loop.batch))))}

        def value(params: Any, batch: Any, key: jax.Array, frozen: Any) -> Any:
            back, posterior = model.apply(params, batch["x"], key)
            mask = jnp.asarray(zoo.spec.mask)
            return vae_loss(jnp.where(mask, batch["x"], 0), jnp.where(mask, back, 0), posterior, beta=self.beta), {}

        def save(params: Any) -> None:
            def code(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
                z = model.apply(params, scaled(tokens), method="encode").mean
                return scaled.invert(np.asarray(model.apply(params, z, method="decode")))

            measure(self.gate, zoo, bank, code, self.loop.seed).check(self.gate.force)
            save_params(run.model, CODEC.name, cfg, params, lambda folder: None, force=True)

        fit(
            run,
            self.loop,
            mesh,
            model.spec,
            lambda: model.init(jax.random.key(self.loop.seed)),
            value,
            placed(make, mesh, self.loop.seed),
            save=save,
        )

    def _config(self, zoo: Zoo) -> TokenVaeConfig:
        return TokenVaeConfig(zoo.spec.rows, zoo.spec.length, self.latent, self.width, self.layers)

    def describe(self) -> Any:
        return CODEC, self._config(open_zoo(Path(self.zoo)))


@dataclass(frozen=True)
class EncoderRecipe(Stage):
    """Align a data-set encoder with the latents of the networks trained on the data."""

    zoo: str = "runs/zoo/zoo"
    loss: Literal["soft_target", "info_nce", "siglip"] = "info_nce"
    """soft_target: as released; info_nce, siglip: normalised."""
    shots: int = 5
    latent: int = 64
    """Components of PCA of whole networks, the frozen side."""
    encoder: SetConfig = field(default_factory=lambda: SetConfig(features=64, hidden=64, out=64))
    loop: LoopConfig = field(default_factory=LoopConfig)

    def train(self, directory: Path) -> None:
        run, zoo, mesh = Run.open(directory, to_json(self)), open_zoo(Path(self.zoo)), start(self.loop.mesh)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        bank, loss_of = Bank.load(Path(self.zoo)), getattr(contrast, self.loss)
        pca = fit_pca(np.asarray(zoo.weights[:4000]), self.latent)
        model = functional(partial(SetOfSets, latent=self.latent), self.encoder)

        def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
            rows = np.sort(rng.integers(len(zoo), size=self.loop.batch))
            latents = (np.asarray(zoo.weights[rows]) - pca.mean) @ pca.components / pca.scale
            return {"w": latents.astype(np.float32), "support": bank.draw(np.asarray(zoo.classes[rows]), self.shots, rng)}

        def value(params: Any, batch: Any, key: jax.Array, frozen: Any) -> Any:
            data = model.apply(params, batch["support"])
            hit = (contrast.unit(batch["w"]) @ contrast.unit(data).T).argmax(1) == jnp.arange(len(data))
            return loss_of(batch["w"], data), {"retrieved": (hit.sum(), len(data))}

        fit(
            run,
            self.loop,
            mesh,
            model.spec,
            lambda: model.init(jax.random.key(self.loop.seed)),
            value,
            placed(make, mesh, self.loop.seed),
            no_decay=("**/points1", "**/points2", "**/seed"),
            save=lambda params: save_params(run.model, ENCODER.name, self.encoder, params, lambda folder: None, force=True),
        )

    def describe(self) -> Any:
        return ENCODER, self.encoder


@dataclass(frozen=True)
class GeneratorRecipe(Stage):
    """Prior and codec without training, the gate, then diffusion; `RUN/model` is what `heirloom generate` takes."""

    zoo: str = "runs/zoo/zoo"
    net: NetConfig = field(default_factory=NetConfig)
    """Must be the zoo's."""
    latent: int = 48
    condition: Literal["per_class", "set", "mlp"] = "per_class"
    prior: Literal["none", "linear"] = "linear"
    schedule: Literal["linear", "scaled_linear"] = "linear"
    shots: int = 5
    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig(width=64, layers=2, heads=4, hidden=128))
    dropout: float = 0.1
    """Probability with which the condition is left out, for guidance."""
    gate: GateConfig = field(default_factory=GateConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=600, batch=128))

    def config(self) -> GeneratorConfig:
        return GeneratorConfig(self.net, self.latent, self.condition, self.shots, self.prior, self.denoiser, schedule=self.schedule)

    def train(self, directory: Path) -> None:
        run, zoo, cfg, mesh = Run.open(directory, to_json(self)), open_zoo(Path(self.zoo)), self.config(), start(self.loop.mesh)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        if zoo.net != self.net:
            raise InputError(f"{self.zoo} holds networks {zoo.net}, the recipe asks for {self.net}: set --net.* to the zoo's")
        bank, model = Bank.load(Path(self.zoo)), functional(Generator, cfg)
        fitted = {path: jnp.asarray(value) for path, value in fit_stage1(cfg, zoo, bank, self.loop.seed).items()}
        params = model.init(jax.random.key(self.loop.seed)) | fitted

        def code(tokens: np.ndarray, rows: np.ndarray) -> Any:
            support = bank.draw(np.asarray(zoo.classes[rows]), cfg.shots, np.random.default_rng(self.loop.seed))
            there = np.ones(support.shape[:3], bool)
            return model.apply(params, model.apply(params, tokens, support, there, method="encode"), support, there, method="decode")

        measure(self.gate, zoo, bank, code, self.loop.seed).check(self.gate.force)
        projection = Projection.load(Path(self.zoo))
        fit(
            run,
            self.loop,
            mesh,
            model.spec,
            lambda: params,
            loss(model, cfg, self.dropout),
            generator_batches(zoo, bank, cfg.shots, self.loop, mesh),
            frozen=cfg.fitted,
            save=lambda params: save_params(run.model, FAMILY.name, cfg, params, projection.save, force=True),
        )

    def describe(self) -> Any:
        return FAMILY, self.config()

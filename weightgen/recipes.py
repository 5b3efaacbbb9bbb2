"""What `heirloom train` runs: a zoo, a codec, an encoder, a generator. Each writes a folder that the next one names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import copy, rmtree
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from common.checkpoint.weights import read_json, staged, write_json
from common.config import to_json
from common.data.sources import SourceConfig, open_source
from common.errors import InputError, positive
from common.nn.functional import functional
from common.train.loop import Run
from common.train.mesh import start
from common.train.metrics import MetricsFile
from common.train.parameters import save_params
from weightgen.autoencoder import TokenCodec, TokenVaeConfig, vae_loss
from weightgen.codec import fit_pca, gate
from weightgen.conditions import LEARNED_POINTS, SetConfig
from weightgen.contrast import Aligned, Loss, unit
from weightgen.data import SHARES, Bank, EmojiTasks, Projection, draw_tasks, emoji_tasks, encoder, shown, text_encoder, thumbnails
from weightgen.denoiser import DenoiserConfig, Order
from weightgen.evaluate import accuracy
from weightgen.formats import CODEC, ENCODER, FAMILY, open_part, save_neighbours
from weightgen.generator import Generator, GeneratorConfig, Told, fit_stage1, loss
from weightgen.nets import NetConfig, predict
from weightgen.normalise import Kind, Normaliser
from weightgen.train import LoopConfig, fit, generator_batches, placed
from weightgen.zoo import FitConfig, Zoo, build, by_chunk, flat, head_tokens, import_folder, open_zoo


class Stage:
    """What the four recipes cannot do, said in one line each."""

    def inherit(self, destination: Path, *, force: bool = False) -> Mapping[str, Any]:
        raise InputError("this recipe inherits from no donor: heirloom train runs it")

    def evaluate(self) -> list[dict[str, Any]]:
        raise InputError("this recipe has nothing to score before it is trained: heirloom train, then heirloom eval RUN/model --data DIR")


@dataclass(frozen=True)
class ZooRecipe(Stage):
    """Train a zoo by random tasks: heads or MLPs on features, or CNNs on pictures of 28 x 28."""

    data: str = "emoji"
    """emoji (its CLDR subgroups, some held out), or a folder with a sub-folder of pictures for each class."""
    backend: str = "embedded:emoji"
    """What looks at pictures: a SOURCE with an image tower, or pixels."""
    net: NetConfig = field(default_factory=NetConfig)
    """features: how many components of the backend's features are kept (of a cnn: 1 for grey, 3 for colour); classes: of a task."""
    told: int = 64
    """Of a cnn: components of the backend's features by which its generator will be told what to make."""
    start: Literal["shared", "random"] = "shared"
    members: int = 4000
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=60, lr=0.1, weight_decay=0.03))
    pictures: int = 40
    """Pictures of a class a network is trained on, at most."""
    chunk: int = 500
    """Networks trained at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "told", "members", "pictures", "chunk")

    def train(self, directory: Path) -> None:
        """Write `RUN/zoo`. A run that is stopped goes on at its last finished chunk."""
        run = Run.open(directory, to_json(self))
        if (directory / "zoo").is_dir():
            print(f"{directory} is finished: the zoo is in {directory / 'zoo'}")
            return
        bank, held, told, projection = self._banks()
        classes = draw_tasks(len(held.names), self.members, self.net.classes, np.random.default_rng(self.seed))
        spec, metrics = head_tokens(self.net), MetricsFile(run.directory / "metrics.jsonl")
        parts = directory / "parts"
        parts.mkdir(exist_ok=True)
        done = sorted(parts.glob("*.npz"))
        metrics.truncate(sum(len(np.load(file)["quality"]) for file in done))
        first = len(done) * self.chunk
        populations = build(
            self.net,
            lambda a, b: shown(self.net, *bank.all(classes[a:b], self.pictures)),
            self.members,
            self.fit,
            start=self.start,
            chunk=self.chunk,
            seed=self.seed,
            first=first,
        )
        for i, params in enumerate(populations, start=len(done)):
            rows = classes[i * self.chunk : (i + 1) * self.chunk]
            x, y = shown(self.net, *held.all(rows, min(int(held.counts.max()), 100)))
            quality = accuracy(predict(self.net, params, x, self.fit.at_once), y, self.net.classes).astype(np.float32)
            with staged(parts / f"{i:06d}.npz", force=True) as file, file.open("wb") as out:
                np.savez(out, weights=flat(spec, spec.flatten({k: np.asarray(v) for k, v in params.items()})), quality=quality)
            metrics.append(
                {"step": min((i + 1) * self.chunk, self.members), "loss": float(1 - quality.mean()), "accuracy": float(quality.mean())}
            )
            done_now = min((i + 1) * self.chunk, self.members)
            print(f"{done_now:,}/{self.members:,} networks, {100 * quality.mean():.1f} % right on other pictures")
        # Into a memory map: a zoo need not fit into memory.
        weights = np.lib.format.open_memmap(parts / "weights.npy", "w+", np.float32, (self.members, spec.count))
        quality = np.zeros(self.members, np.float32)
        for i, file in enumerate(sorted(parts.glob("*.npz"))):
            at = slice(i * self.chunk, (i + 1) * self.chunk)
            with np.load(file) as part:
                weights[at], quality[at] = part["weights"], part["quality"]
        zoo = Zoo(weights, quality, classes, self.net, spec)

        def beside(folder: Path) -> None:
            told.save(folder)
            if told is not bank:
                bank.save(folder, "pictures")
            held.save(folder, "held")
            projection.save(folder)

        zoo.save(directory / "zoo", beside=beside)
        rmtree(parts)

    def _banks(self) -> tuple[Bank, Bank, Bank, Projection]:
        """Pictures to train on, pictures to score on, those to train on as a generator is told them, and how they became features."""
        if self.data == "emoji":
            if self.net.kind == "cnn":
                raise InputError("there are too few emoji for CNNs: set data to a folder with a sub-folder for each class")
            tasks: EmojiTasks = emoji_tasks(self.backend, self.net.features, seed=0)
            return tasks.seen["support"], tasks.seen["test"], tasks.seen["support"], tasks.projection
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
        features = self.net.features if self.net.kind != "cnn" else self.told
        projection = Projection.fit(self.backend, raw[~held], features)
        told = projection(raw)
        x = told if self.net.kind != "cnn" else thumbnails([r["image"] for r in records], self.net.features)
        train, score = (Bank.of(x[rows], labels[rows], names) for rows in (~held, held))
        return train, score, train if x is told else Bank.of(told[~held], labels[~held], names), projection

    def describe(self) -> Any:
        raise InputError("a zoo is no model: heirloom train builds it")


@dataclass(frozen=True)
class GateConfig:
    """The codec must keep the weights it codes and the accuracy of their networks, or training stops before it starts."""

    tolerance: float = 0.02
    """Accuracy that may be lost, on pictures no network of the zoo was trained on; they must have more than that above chance."""
    error: float = 0.5
    """Relative squared error that what is coded may have (with a linear prior, what it leaves): more is hardly a codec, and 0.42 has
    been seen to cost heads 5 points of accuracy, 0.23 none."""
    force: bool = False
    members: int = 200
    """Networks of the zoo it is measured on: the last ones, at most a fifth, on which no codec is fitted before. Checkpoints of others
    may all be unlike, so with them it is measured on what it was fitted on, and only the error, as they have no pictures."""


def left_out(cfg: GateConfig, zoo: Zoo) -> int:
    """How many of the zoo's last networks are for the gate alone."""
    return min(cfg.members, len(zoo) // 5) if zoo.net else 0


def measure(cfg: GateConfig, zoo: Zoo, bank: Bank, code: Any, seed: int) -> None:
    """The gate. code(tokens, rows) -> what the codec is given of these tokens, and what it gives back.

    Raises InputError when it is not passed.
    """
    held = left_out(cfg, zoo)
    rows = np.arange(len(zoo))[-held:] if held else np.random.default_rng(seed).permutation(len(zoo))[: cfg.members]
    rows, before, after, chance = np.sort(rows), np.nan, np.nan, 0.0
    tokens = zoo.tokens(rows)
    given, back = (np.asarray(x) for x in code(tokens, rows))
    if zoo.net:
        x, y = shown(zoo.net, *bank.all(np.asarray(zoo.classes[rows]), 20))
        nets = [zoo.spec.unflatten(jnp.asarray(t), zoo.spec.like) for t in (tokens, tokens - given + back)]
        before, after = (accuracy(predict(zoo.net, params, x, at_once=20), y, zoo.net.classes).mean() for params in nets)
        chance = 1 / zoo.net.classes
    found = gate(before, after, flat(zoo.spec, given), flat(zoo.spec, back), cfg.tolerance, chance, cfg.error)
    known = f"{100 * found.before:.1f} % before, {100 * found.after:.1f} % after a round trip" if zoo.net else "accuracy is not known"
    print(f"codec: {known}, relative error {found.error:.4f}, of {len(rows)} networks{' it was not fitted on' if held else ''}")
    found.check(cfg.force)


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
    """Measured only: the generator that takes the codec refuses it."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def train(self, directory: Path) -> None:
        run, zoo, mesh = Run.open(directory, to_json(self)), open_zoo(Path(self.zoo)), start(self.loop.mesh)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        bank, cfg = pictures_of(self.zoo), self._config(zoo)
        model = functional(TokenCodec, cfg)
        shown_to = len(zoo) - left_out(self.gate, zoo)
        some = zoo.tokens(slice(0, min(4000, shown_to)))
        scaled = Normaliser.fit(self.normalise, zoo.spec, some)
        fitted = {"mean": scaled.mean, "std": scaled.std, "scale": np.float32(1)}
        mask = jnp.asarray(zoo.spec.mask)

        def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
            return {"tokens": zoo.tokens(np.sort(rng.integers(shown_to, size=self.loop.batch)))}

        def value(params: Any, batch: Any, key: jax.Array, frozen: Any) -> Any:
            x, back, posterior = model.apply(params, batch["tokens"], key)
            return vae_loss(jnp.where(mask, x, 0), jnp.where(mask, back, 0), posterior, beta=self.beta), {}

        def save(params: Any) -> None:
            encode = jax.jit(partial(model.apply, method="encode"))
            params = params | {"scale": encode(params, some).std()}

            def code(tokens: np.ndarray, rows: np.ndarray) -> Any:
                return tokens, model.apply(params, encode(params, tokens), method="decode")

            measure(self.gate, zoo, bank, code, self.loop.seed)
            save_params(run.model, CODEC.name, cfg, params, lambda folder: None, force=True)

        fit(
            run,
            self.loop,
            mesh,
            model.spec,
            lambda: model.init(jax.random.key(self.loop.seed)) | {name: jnp.asarray(x) for name, x in fitted.items()},
            value,
            placed(make, mesh, self.loop.seed),
            frozen=tuple(fitted),
            save=save,
        )

    def _config(self, zoo: Zoo) -> TokenVaeConfig:
        order: Order = "exchangeable" if zoo.net and zoo.net.kind == "head" else "ordered"
        return TokenVaeConfig(zoo.spec.rows, zoo.spec.length, self.latent, self.width, self.layers, normalise=self.normalise, order=order)

    def describe(self) -> Any:
        return CODEC, self._config(open_zoo(Path(self.zoo)))


@dataclass(frozen=True)
class EncoderRecipe(Stage):
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
        run, zoo, mesh = Run.open(directory, to_json(self)), open_zoo(Path(self.zoo)), start(self.loop.mesh)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        bank = Bank.load(Path(self.zoo))
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
            save_params(run.model, ENCODER.name, cfg, own, lambda folder: None, force=True)

        fit(
            run,
            self.loop,
            mesh,
            model.spec,
            lambda: model.init(jax.random.key(self.loop.seed)),
            value,
            placed(make, mesh, self.loop.seed),
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
        run, folder, mesh = Run.open(directory, to_json(self)), Path(self.zoo), start(self.loop.mesh)
        if run.finished(self.loop.steps):
            print(f"{directory} is finished: {run.model}")
            return
        zoo, bank = open_zoo(folder), Bank.load(folder)
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
            for name in ("features.safetensors", "tasks.json"):
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


@dataclass(frozen=True)
class CheckpointsRecipe(Stage):
    """A zoo of checkpoints that exist: one architecture, a file or folder each, of any library that writes safetensors or torch files.

    `tasks.json` in the folder says in words what each is for, {file: words}; without it, each is its own task. Low-rank adapters of
    peft are brought into one gauge first.
    """

    folder: str = "checkpoints"
    select: str = ""
    """Regex of the tensors that are generated; the others are left alone."""
    chunk: int = 0
    """Length of chunks each tensor is cut into; 0: a whole checkpoint is one row."""
    members: Literal["checkpoints", "chunks"] = "checkpoints"
    """chunks: each chunk is a member by itself, known by its number, as was done for language models."""
    backend: str = ""
    """What embeds the words: a SOURCE with a text tower (embedded:emoji); none: tasks are numbers, and only these can be asked for."""

    def train(self, directory: Path) -> None:
        """Write `RUN/zoo`."""
        Run.open(directory, to_json(self))
        if (directory / "zoo").is_dir():
            print(f"{directory} is finished: the zoo is in {directory / 'zoo'}")
            return
        if self.members == "chunks" and not self.chunk:
            raise InputError("chunks need a length: set chunk, such as 4096")
        zoo, words = import_folder(Path(self.folder), chunk=self.chunk or None, select=self.select)
        if self.members == "chunks":
            zoo = by_chunk(zoo)
            words = tuple(f"chunk {i}" for i in range(zoo.classes.max() + 1))
        bank, projection = Bank.numbers(words), None
        told = "chunk" if self.members == "chunks" else "label"
        if self.backend and told == "label":
            told, raw = "text", text_encoder(self.backend)(words)
            projection = Projection.identity(self.backend, raw.shape[1])
            bank = Bank.of(projection(raw), np.arange(len(words)), words)

        def beside(folder: Path) -> None:
            bank.save(folder)
            write_json(folder / "tasks.json", {"told": told, "tasks": words})
            if projection:
                projection.save(folder)

        zoo.save(directory / "zoo", beside=beside)
        print(f"{directory / 'zoo'}: {len(zoo):,} rows of {zoo.spec.count:,} weights, {len(words)} tasks told by {told}")

    def describe(self) -> Any:
        raise InputError("a zoo is no model: heirloom train builds it")


def check_codec(cfg: TokenVaeConfig, zoo: Zoo, path: str) -> None:
    """Raises InputError for a codec of other networks than the zoo's."""
    own, ours = (cfg.tokens, cfg.length), (zoo.spec.rows, zoo.spec.length)
    if own != ours:
        raise InputError("{} codes {} tokens of {} weights, the zoo's networks have {} of {}: train another".format(path, *own, *ours))


def pictures_of(zoo: str) -> Bank:
    """What the networks of a zoo take, pictures or features: such as they were not trained on where these are stored."""
    return Bank.load(Path(zoo), next((name for name in ("held", "pictures") if (Path(zoo) / f"{name}.npz").is_file()), "bank"))


def zoo_words(folder: Path) -> str:
    """How an imported zoo's members are told apart: text, label or chunk."""
    return str(read_json(folder / "tasks.json")["told"])

"""Recipes of zoos: trained here, or of checkpoints that exist."""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Literal

import numpy as np

from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError, between, check_seed, positive
from heirloom.common.files import staged, write_json
from heirloom.common.mesh import start
from heirloom.common.paths import METRICS
from heirloom.common.processes import on_first
from heirloom.common.train.about import note_start
from heirloom.common.train.loop import Run
from heirloom.common.train.metrics import MetricsFile
from heirloom.common.train.resume import with_defaults
from weightgen.metrics import accuracy
from weightgen.zoo.checkpoints import import_folder
from weightgen.zoo.data import (
    SHARES,
    Bank,
    Projection,
    draw_tasks,
    emoji_tasks,
    encoder,
    labelled,
    network_inputs,
    text_encoder,
    thumbnails,
)
from weightgen.zoo.fit import FitConfig, build
from weightgen.zoo.foreign import listed
from weightgen.zoo.nets import NetConfig, predict
from weightgen.zoo.zoo import Zoo, by_chunk, flat, head_tokens


@dataclass(frozen=True)
class ZooData:
    """Pictures as a zoo's networks take them: to train on, and held out to score on.

    condition: features of the former, for a generator; projection: how pictures became features.
    """

    train: Bank
    held: Bank
    condition: Bank
    projection: Projection


@dataclass(frozen=True)
class ZooRecipe:
    """Train a zoo by random tasks: heads or MLPs on features, or CNNs on pictures of 28 x 28."""

    data: str = "emoji"
    """emoji (its CLDR subgroups, some held out), or a folder with a sub-folder of pictures for each class."""
    backend: str = "embedded:emoji"
    """Encoder of pictures: a SOURCE with an image tower, or pixels."""
    net: NetConfig = field(default_factory=NetConfig)
    """features: how many components of the backend's features are kept (of a cnn: 1 for grey, 3 for colour); classes:
    of a task.
    """
    told: int = 64
    """Of a cnn: components of the backend's features that are the condition of its generator."""
    start: Literal["shared", "random"] = "shared"
    members: int = 4000
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=60, lr=0.1, weight_decay=0.03))
    pictures: int = 40
    """Pictures of a class a network is trained on, at most."""
    chunk: int = 500
    """Networks trained at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        positive(self, "told", "members", "pictures", "chunk")

    def train(self, directory: Path) -> None:
        """Write `RUN/zoo`, in a job's first process. A stopped run continues after its last finished chunk.

        Raises InputError when networks diverge.
        """
        start()
        run = Run.open(directory, asdict(self), defaults=partial(with_defaults, cfg=self))
        on_first(lambda: self._build(run, directory))

    def _build(self, run: Run, directory: Path) -> None:
        if (directory / "zoo").is_dir():
            print(f"{directory} is finished: the zoo is in {directory / 'zoo'}")
            return
        data = self._data()
        bank, held = data.train, data.held
        classes = draw_tasks(len(held.names), self.members, self.net.classes, rng=np.random.default_rng(self.seed))
        spec, metrics = head_tokens(self.net), MetricsFile(run.directory / METRICS)
        parts = directory / "parts"
        parts.mkdir(exist_ok=True)
        done = sorted(parts.glob("*.npz"))
        note_start(run.directory, len(done) * self.chunk)
        metrics.truncate(sum(len(np.load(file)["quality"]) for file in done))
        first = len(done) * self.chunk

        def examples(a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
            x, y = bank.all(classes[a:b], self.pictures)
            return network_inputs(self.net, x), y

        populations = build(
            self.net,
            examples,
            self.members,
            fit=self.fit,
            start=self.start,
            chunk=self.chunk,
            seed=self.seed,
            first=first,
        )
        for i, params in enumerate(populations, start=len(done)):
            rows = classes[i * self.chunk : (i + 1) * self.chunk]
            x, y = held.all(rows, min(int(held.counts.max()), 100))
            found = predict(self.net, params, network_inputs(self.net, x), at_once=self.fit.at_once)
            quality = accuracy(found, y, self.net.classes).astype(np.float32)
            trained = flat(spec, spec.flatten({k: np.asarray(v) for k, v in params.items()}))
            if len(bad := np.flatnonzero(~np.isfinite(trained).all(1))):
                numbers = listed(str(i * self.chunk + row) for row in bad)
                which = f"{len(bad)} of {len(trained)} networks diverged (numbers {numbers})"
                raise InputError(f"{which}: lower fit.lr, now {self.fit.lr:g}")
            with staged(parts / f"{i:06d}.npz", force=True) as file, file.open("wb") as out:
                np.savez(out, weights=trained, quality=quality)
            trained_now = min((i + 1) * self.chunk, self.members)
            metrics.append({"step": trained_now, "loss": float(1 - quality.mean()), "accuracy": float(quality.mean())})
            print(f"{trained_now:,}/{self.members:,} networks, {100 * quality.mean():.1f} % right on other pictures")
        # Into a memory map: a zoo need not fit into memory.
        weights = np.lib.format.open_memmap(parts / "weights.npy", "w+", np.float32, (self.members, spec.count))
        quality = np.zeros(self.members, np.float32)
        for i, file in enumerate(sorted(parts.glob("*.npz"))):
            at = slice(i * self.chunk, (i + 1) * self.chunk)
            with np.load(file) as part:
                weights[at], quality[at] = part["weights"], part["quality"]
        zoo = Zoo(weights=weights, quality=quality, classes=classes, net=self.net, spec=spec)

        def sidecars(folder: Path) -> None:
            data.condition.save(folder)
            if data.condition is not bank:
                bank.save(folder, "pictures")
            held.save(folder, "held")
            data.projection.save(folder)

        zoo.save(directory / "zoo", sidecars=sidecars)
        rmtree(parts)

    def _data(self) -> "ZooData":
        if self.data == "emoji":
            if self.net.kind == "cnn":
                raise InputError("too few emoji for CNNs: set data to a folder with one for each class")
            tasks = emoji_tasks(self.backend, self.net.features, seed=0)
            bank = tasks.seen["support"]
            return ZooData(train=bank, held=tasks.seen["test"], condition=bank, projection=tasks.projection)
        source = open_source(SourceConfig(path=self.data, text=""))
        names = getattr(source, "classes", ())
        if len(names) < self.net.classes:
            needed = f"tasks of {self.net.classes} need as many"
            raise InputError(f"{self.data} has {len(names)} classes in sub-folders, {needed}")
        records, labels = labelled(source, self.data)
        raw = encoder(self.backend)(records)
        orders = (np.random.default_rng([self.seed, c]).permutation((labels == c).sum()) for c in range(len(names)))
        place = np.concatenate(list(orders))
        order = np.argsort(labels, kind="stable")
        held = np.zeros(len(labels), bool)
        held[order] = place < np.maximum(np.rint(SHARES["select"] * np.bincount(labels)[labels[order]]), 1)
        kept = self.net.features if self.net.kind != "cnn" else self.told
        projection = Projection.fit(self.backend, raw[~held], kept)
        features = projection(raw)
        x = features if self.net.kind != "cnn" else thumbnails(records, self.net.features)
        train = Bank.of(x[~held], labels[~held], names)
        condition = train if x is features else Bank.of(features[~held], labels[~held], names)
        held_out = Bank.of(x[held], labels[held], names)
        return ZooData(train=train, held=held_out, condition=condition, projection=projection)


@dataclass(frozen=True)
class CheckpointsRecipe:
    """Import a zoo of existing checkpoints: one architecture, a safetensors or torch file or folder each.

    `tasks.json` in the folder describes each in words, {file: words}; without it, each is its own task. Low-rank
    adapters (peft, kohya, diffusers) are brought into canonical form first, their scale (alpha / rank) inside;
    `zoo.json` records it.
    """

    folder: str = "checkpoints"
    select: str = ""
    """Regex of the tensors that are generated; the others are left alone."""
    chunk: int = 0
    """Length of chunks each tensor is cut into; 0: a whole checkpoint is one row."""
    members: Literal["checkpoints", "chunks"] = "checkpoints"
    """chunks: each chunk is a member by itself, known by its number, as was done for language models."""
    backend: str = ""
    """Encoder of the words: a SOURCE with a text tower (embedded:emoji); none: tasks are numbers, and only these can be
    generated for.
    """

    def __post_init__(self) -> None:
        between(self, "chunk", below=2**30)

    def train(self, directory: Path) -> None:
        """Write `RUN/zoo`, in the first process of a job."""
        start()
        run = Run.open(directory, asdict(self), defaults=partial(with_defaults, cfg=self))
        on_first(lambda: self._write(run.directory))

    def _write(self, directory: Path) -> None:
        if (directory / "zoo").is_dir():
            print(f"{directory} is finished: the zoo is in {directory / 'zoo'}")
            return
        if self.members == "chunks" and not self.chunk:
            raise InputError("chunks need a length: set chunk, such as 4096")
        zoo, words = import_folder(Path(self.folder).expanduser(), chunk=self.chunk or None, select=self.select)
        if self.members == "chunks":
            zoo = by_chunk(zoo)
            words = tuple(f"chunk {i}" for i in range(zoo.classes.max() + 1))
        bank, projection = Bank.numbers(words), None
        condition = "chunk" if self.members == "chunks" else "label"
        if self.backend and condition == "label":
            condition, raw = "text", text_encoder(self.backend)(words)
            projection = Projection.identity(self.backend, raw.shape[1])
            bank = Bank.of(projection(raw), np.arange(len(words)), words)

        def sidecars(folder: Path) -> None:
            bank.save(folder)
            write_json(folder / "tasks.json", {"told": condition, "tasks": words})
            if zoo.about["adapters"]:
                write_json(folder / "adapter.json", zoo.about["adapters"])
            if projection:
                projection.save(folder)

        zoo.save(directory / "zoo", sidecars=sidecars)
        for note in zoo.about["notes"]:
            print(f"note: {note}")
        size = f"{len(zoo):,} rows of {zoo.spec.count:,} weights"
        print(f"{directory / 'zoo'}: {size}, {len(words)} tasks, condition: {condition}")

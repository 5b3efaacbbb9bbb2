"""Pictures by class, as zoos of small networks see them, and tasks drawn from several data sets."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.train.optim import OptimConfig
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.generator.in_memory import Trained, train_generator
from weightgen.generator.sample import SampleConfig
from weightgen.train import LoopConfig
from weightgen.zoo.data import Bank, Projection, draw_tasks, thumbnails
from weightgen.zoo.nets import NetConfig
from weightgen.zoo.zoo import Zoo

WAYS, SHOTS = 5, 5
FEATURES = 64  # of a picture, by PCA


@dataclass(frozen=True)
class World:
    """Pictures by class as one kind of network sees them, and as the condition does (PCA features); train and test."""

    train: Bank
    test: Bank
    told: Bank
    shape: tuple[int, ...]


def pictures(
    world: World, bank: Bank, classes: np.ndarray, each: int, salt: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """x [member, 5 * each, ...] and y of these classes [member, 5]."""
    x = bank.draw(classes, each, np.random.default_rng(salt))
    y = np.broadcast_to(np.repeat(np.arange(5), each), (len(classes), 5 * each)).astype(np.int32)
    return x.reshape(len(classes), 5 * each, *world.shape), y


def config(world: World, kind: Any) -> NetConfig:
    return NetConfig(kind, features=world.shape[-1], classes=5)


def generator(
    zoo: Zoo, told: Bank, prior: Any, *, denoiser: DenoiserConfig, steps: int, batch: int, draws: int, seed: int,
    folder: Path,
) -> Trained:  # fmt: skip
    """Trains a generator that is told SHOTS pictures of a class. No latent is left out: networks have no low rank."""
    cfg = GeneratorConfig(
        net=zoo.net,
        latent=min(zoo.spec.length, len(zoo) * zoo.spec.rows),
        condition="per_class",
        shots=SHOTS,
        prior=prior,
        denoiser=denoiser,
        told=told.features.shape[1],
    )
    optim = OptimConfig(lr=1e-3, warmup=max(steps // 20, 1), clip=1.0)
    loop = LoopConfig(steps=steps, batch=min(batch, len(zoo)), optim=optim, seed=seed, save_every=steps)
    return replace(train_generator(cfg, zoo, told, loop=loop, directory=folder), how=SampleConfig(steps=draws))


@dataclass(frozen=True)
class Source:
    """Where a data set is; the columns with classes and, where pictures belong together, with their groups."""

    splits: tuple[SourceConfig, ...]
    label: str
    group: str = ""
    least: int = 1
    """Groups a class has."""


def sources(fashion: str, cifar: str) -> dict[str, Source]:
    def read(path: str, split: str, *columns: str) -> SourceConfig:
        return SourceConfig(path, split, text="", columns=columns)

    return {
        "digits": Source(tuple(read("digits", split, "label") for split in ("train", "test")), "label"),
        "Fashion-MNIST": Source(tuple(read(f"{fashion}/{s}", "", "label") for s in ("train", "test")), "label"),
        "CIFAR-10": Source(tuple(read(f"{cifar}/{split}", "", "label") for split in ("train", "test")), "label"),
        "emoji": Source((read("emoji", "", "subgroup", "concept"),), "subgroup", "concept", least=6),
        "icons": Source(tuple(read("icons", split, "object") for split in ("train", "test")), "object"),
    }


@dataclass(frozen=True)
class Pictures:
    """A data set: [picture, 28 * 28 * 3] f32 in [-1, 1] and labels, for training and for tests; its classes' names."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    names: tuple[str, ...]


def read(source: Source, most: int, seed: int = 0) -> Pictures:
    """Reads up to `most` training pictures of each class. Where a data set has no split, three tenths of the groups
    (concepts) of each class are for tests.
    """
    rng, rows = np.random.default_rng(seed), []
    for i, split in enumerate(source.splits):
        opened = open_source(replace(split, image=""))
        rows += [(i, n, opened[n]) for n in range(len(opened))]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    groups: dict[str, list[str]] = {}
    for i, n, record in rows:
        known = groups.setdefault(str(record[source.label]), [])
        group = str(record[source.group]) if source.group else f"{i}, {n}"
        if group not in known:
            known.append(group)
    names = sorted(name for name, known in groups.items() if len(known) >= source.least)
    kept: dict[str, list[tuple[int, int, int]]] = {"train": [], "test": []}
    counts: dict[tuple[str, str], int] = {}
    for i, n, record in rows:
        name = str(record[source.label])
        if name not in names:
            continue
        tested = bool(i)
        if len(source.splits) == 1:
            tested = groups[name].index(str(record[source.group])) < round(0.3 * len(groups[name]))
        part = "test" if tested else "train"
        counts[part, name] = counts.get((part, name), 0) + 1
        if counts[part, name] <= (most // 3 if tested else most):
            kept[part].append((i, n, names.index(name)))
    whole = [open_source(split) for split in source.splits]
    found = {
        part: (thumbnails([whole[i][n] for i, n, _ in rows], 3), np.array([label for _, _, label in rows]))
        for part, rows in kept.items()
    }
    return Pictures(found["train"], found["test"], tuple(names))


def world(sets: dict[str, Pictures], left_out: str) -> tuple[World, dict[str, range]]:
    """All data sets as one bank of features, and each one's classes in it; the features know nothing of `left_out`."""
    known = np.concatenate([found.train[0] for name, found in sets.items() if name != left_out])
    some = np.random.default_rng(0).permutation(len(known))[:4000]
    project = Projection.fit("pixels", known[some], FEATURES)
    names = [f"{name}: {c}" for name, found in sets.items() for c in found.names]
    firsts = np.cumsum([0, *(len(found.names) for found in sets.values())])
    classes = {name: range(a, b) for name, a, b in zip(sets, firsts, firsts[1:], strict=False)}

    def bank(part: str) -> Bank:
        read = [(name, getattr(found, part)) for name, found in sets.items()]
        labels = np.concatenate([y + classes[name].start for name, (_, y) in read])
        return Bank.of(np.concatenate([project(x) for _, (x, _) in read]), labels, names)

    train = bank("train")
    return World(train, bank("test"), train, (FEATURES,)), classes


def tasks(classes: dict[str, range], sets: list[str], n: int, rng: np.random.Generator) -> np.ndarray:
    """Classes of `n` tasks, [task, 5] int32; each is of one data set, and the sets take turns."""
    found = [draw_tasks(len(classes[name]), -(-n // len(sets)), WAYS, rng) + classes[name].start for name in sets]
    return np.stack(found, 1).reshape(-1, WAYS)[:n].astype(np.int32)

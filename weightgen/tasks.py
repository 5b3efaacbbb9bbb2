"""Tasks for a generator, by pictures or in words, and networks drawn for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.pictures import Picture
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError, nearest
from heirloom.common.files import read_json
from heirloom.common.mesh import start
from heirloom.common.train.parameters import load_params
from weightgen.d2nwg.model import D2nwgConfig
from weightgen.d2nwg.model import sample as sample_d2nwg
from weightgen.generator.sample import SampleConfig, drawer
from weightgen.zoo.data import Encode, Projection, encoder, labelled, network_inputs, text_encoder, thumbnails
from weightgen.zoo.nets import NetConfig

WORDS = ("text", "label", "chunk")  # conditions that are no pictures


@dataclass(frozen=True)
class Pictures:
    """features: [picture, feature], the generator's condition; x: the network's inputs; y: [picture] labels."""

    features: np.ndarray
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Task:
    """What to make: a condition [item, class, shots, feature] and pictures.

    `shots` of the condition count; there is one item, or one for each chunk of a checkpoint.

    support, select, test: different pictures for the condition, to choose by and to test on; None for a task in words,
    the latter two also where a class has no pictures left over.
    """

    names: tuple[str, ...]
    condition: np.ndarray
    shots: int
    support: Pictures | None = None
    select: Pictures | None = None
    test: Pictures | None = None


Dataset = str | Mapping[str, Sequence[Picture]]
"""A folder with a sub-folder for each class, or the pictures of each class by its name."""


def read_dataset(
    dataset: Dataset, projection: Projection, cfg: NetConfig, encode: Encode | None = None
) -> tuple[tuple[str, ...], Pictures]:
    """Read classes and their pictures. encode: an open encoder of the projection's backend.

    Raises InputError where there are no classes, or not as many as the networks have.
    """
    if isinstance(dataset, str):
        source = open_source(SourceConfig(path=dataset, text=""))
        names = tuple(getattr(source, "classes", ()))
        if not names:
            raise InputError(f"{dataset} has no classes: put the pictures of each class into its sub-folder")
    else:
        names = tuple(dataset)
    if len(names) != cfg.classes:
        way = f"these are {cfg.classes}-way networks"
        raise InputError(f"{_name(dataset)} has {len(names)} classes, {way}; keep as many sub-folders")
    if isinstance(dataset, str):
        records, labels = labelled(source, dataset)
    else:
        records = [{"key": f"{name}, number {i}", "image": x} for name in names for i, x in enumerate(dataset[name])]
        labels = np.repeat(np.arange(len(names)), [len(dataset[name]) for name in names])
    return names, examples(records, labels, projection, cfg, encode)


def examples(
    pictures: Sequence[Any], labels: np.ndarray, projection: Projection, cfg: NetConfig, encode: Encode | None = None
) -> Pictures:
    """Turn pictures, or records of them, into features for the generator and inputs for its networks."""
    features = projection((encode or encoder(projection.backend))(pictures))
    inputs = thumbnails(pictures, cfg.features) if cfg.kind == "cnn" else features
    return Pictures(features, network_inputs(cfg, inputs), labels)


def _name(dataset: Dataset) -> str:
    return dataset if isinstance(dataset, str) else "the dictionary of pictures"


def read_pictures(donor: Donor, dataset: Dataset, seed: int, encode: Encode | None = None) -> Task:
    """Read pictures by class, split into condition, selection and test at random.

    Raises InputError when there are no classes, or other numbers of them than the generator takes.
    """
    cfg: Any = donor.cfg
    if cfg.net is None:
        raise InputError(f"{donor.path} takes a task in words, not pictures: give --task")
    names, found = read_dataset(dataset, Projection.load(donor.folder), cfg.net, encode)
    features, x, labels = found.features, found.x, found.y
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(labels == c)) for c in range(len(names))]
    if empty := [name for name, own in zip(names, order, strict=True) if not len(own)]:
        raise InputError(f"{_name(dataset)}: {empty[0]} has no picture")
    shots = min(cfg.shots, *(len(own) for own in order))
    condition = np.zeros((1, len(names), cfg.shots, features.shape[1]), np.float32)
    for c, own in enumerate(order):
        condition[0, c, :shots] = features[own[:shots]]
    rest = [own[shots:] for own in order]
    halves = (np.concatenate([own[i::2] for own in rest]) for i in (0, 1))
    deal = [np.concatenate([own[:shots] for own in order]), *halves]
    support, select, test = (Pictures(features[rows], x[rows], labels[rows]) for rows in deal)
    enough = min(len(own) for own in rest) >= 2
    left = dict(select=select if enough else None, test=test if enough else None)
    return Task(names=names, condition=condition, shots=shots, support=support, **left)


def read_words(donor: Donor, task: str) -> Task:
    """Read a task in words: embedded for the condition text, else one of the zoo's. Chunks need none.

    Raises InputError for a generator that takes pictures, and for a task the zoo has not.
    """
    cfg: Any = donor.cfg
    if isinstance(cfg, D2nwgConfig) or cfg.condition not in WORDS:
        raise InputError(f"{donor.path} takes pictures, not words: give --dataset, a folder with one for each class")
    if cfg.condition == "chunk":
        if task:
            raise InputError(f"{donor.path} draws all chunks and has no tasks: leave out --task")
        chunks = np.arange(cfg.labels, dtype=np.float32).reshape(-1, 1, 1, 1)
        return Task(names=("all chunks",), condition=chunks, shots=1)
    known = read_json(donor.folder / "tasks.json")["tasks"]
    if not task:
        raise InputError(f"give --task, such as {known[0]!r}: what the weights are for")
    if cfg.condition == "text":
        projection = Projection.load(donor.folder)
        features = projection(text_encoder(projection.backend)([task]))
        return Task(names=(task,), condition=features.reshape(1, 1, 1, -1), shots=1)
    if task not in known:
        raise InputError(f"no task {task!r} in the zoo{nearest(task, known)}; there are {', '.join(known[:10])}")
    return Task(names=(task,), condition=np.float32(known.index(task)).reshape(1, 1, 1, 1), shots=1)


def draw_weights(donor: Donor, task: Task, how: SampleConfig, n: int, seed: int) -> np.ndarray:
    """Draw `n` networks, tokens [sample, token, length]; n changes no sample, except in the released system."""
    if n < 1:
        raise InputError(f"-n {n}: draw 1 or more")
    cfg, items = donor.cfg, len(task.condition)
    if isinstance(cfg, D2nwgConfig) and how != SampleConfig():
        own = "the released system draws with all its steps and without guidance"
        raise InputError(f"{own}: leave out the settings of the sampler")
    params = load_params(donor, start())
    condition = np.tile(task.condition, (n, 1, 1, 1))
    mask = np.broadcast_to(np.arange(cfg.shots) < task.shots, condition.shape[:3])
    key = jax.random.key(seed)
    if isinstance(cfg, D2nwgConfig):
        # It has its own sampler: all steps, no guidance, and noise that depends on n.
        support = jnp.asarray(condition[:, :, : task.shots])
        weights = sample_d2nwg(donor.model, cfg, params["k"], params=params, support=support, key=key)
        return cfg.whole.padded(np.asarray(weights)[:, : cfg.whole.count])
    rows = np.asarray(drawer(donor.model, cfg, how)(params, condition, mask, key, np.arange(n * items)))
    return rows.reshape(n, items * rows.shape[1], -1)

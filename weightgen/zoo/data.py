"""Pictures as features by class: the training data of zoos, and the condition of generators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from heirloom.common.data.pictures import Background, decode, decode_record
from heirloom.common.data.preprocess import Preprocess, eval_image
from heirloom.common.data.sources import Source, SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.methods import open_any
from weightgen.zoo.nets import NetConfig

Encode = Callable[[Sequence[Any]], np.ndarray]
"""Pictures (encoded bytes, uint8 [h, w, 3], or records, which errors name) to raw features [picture, raw] f32."""
THUMBNAIL = 16  # pixels a side, of the backend "pixels"
CNN_SIDE = 28
BATCH = 256
SHARES = {"support": 0.5, "select": 0.2, "test": 0.3}  # of a class's concepts


def encoder(backend: str) -> Encode:
    """Open an encoder of pictures: `pixels` for 16 x 16 thumbnails, else the image tower of the model at a SOURCE.

    Any function of that shape serves as well; this one is for configs. Raises InputError when the model has no image
    tower.
    """
    if backend == "pixels":
        return lambda pictures: np.stack([_thumbnail(p) for p in pictures])
    donor = open_any(backend)
    if not hasattr(donor.family.module, "encode_image"):
        raise InputError(f"{backend} is a {donor.family.name} model, which encodes no images: name a CLIP, or pixels")
    if not (donor.folder / "preprocess.json").is_file():
        make = f"heirloom convert {backend} DEST makes a folder that has one"
        raise InputError(f"{backend}: no preprocess.json next to the weights; {make}")
    pre = Preprocess.load(donor.folder)
    params = {path: np.asarray(view, np.float32) for path, view in donor.source.values.items()}
    forward = jax.jit(lambda x: donor.model.apply(params, x, method="encode_image"))

    def encode(pictures: Sequence[Any]) -> np.ndarray:
        out = []
        for i in range(0, len(pictures), BATCH):
            part = np.stack([eval_image(_decoded(p, pre.background), pre) for p in pictures[i : i + BATCH]])
            full = np.zeros((BATCH, *part.shape[1:]), np.float32)  # one shape, one compilation
            full[: len(part)] = part
            out.append(np.asarray(forward(full))[: len(part)])
        return np.concatenate(out)

    return encode


def text_encoder(backend: str) -> Callable[[Sequence[str]], np.ndarray]:
    """Open an encoder of words to unit vectors [text, feature] f32: the text tower at a SOURCE, or InputError."""
    donor = open_any(backend)
    if not hasattr(donor.family.module, "encode_text"):
        raise InputError(f"{backend} is a {donor.family.name} model, which encodes no text: name a CLIP")
    tokenizer, context = Tokenizer.load(donor.folder), donor.cfg.text.context
    params = {path: jnp.asarray(np.asarray(view, np.float32)) for path, view in donor.source.values.items()}
    forward = jax.jit(lambda tokens: donor.model.apply(params, tokens, method="encode_text"))

    def encode(texts: Sequence[str]) -> np.ndarray:
        raw = np.asarray(forward(tokenizer(list(texts), context)), np.float32)
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)

    return encode


def labelled(source: Source, path: str) -> tuple[list[Any], np.ndarray]:
    """Read all records of a source with classes, labels [record] int. Raises InputError for one without."""
    records, count = [source[i] for i in range(len(source))], len(getattr(source, "classes", ()))
    labels = np.array([-1 if r.get("label") is None else int(r["label"]) for r in records])
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= count))):
        key = records[wrong[0]].get("key", wrong[0])
        bad = f"{len(wrong)} of {len(records)} pictures"
        raise InputError(f"{path}: {bad} have none of its {count} classes ({key}); leave them out")
    return records, labels


def _decoded(picture: Any, background: Background = "none") -> Image.Image:
    """Decode a picture. Raises InputError, which names it if it is a record."""
    return decode_record(picture, background) if isinstance(picture, dict) else decode(picture, background)


def _thumbnail(picture: Any, side: int = THUMBNAIL, channels: int = 3) -> np.ndarray:
    small = _decoded(picture).resize((side, side))
    return np.asarray(small if channels == 3 else small.convert("L"), np.float32).reshape(-1) / 127.5 - 1


def thumbnails(pictures: Sequence[Any], channels: int) -> np.ndarray:
    """Resize pictures for a cnn, [picture, 28 * 28 * channels] in [-1, 1]; 1 channel is grey."""
    return np.stack([_thumbnail(p, CNN_SIDE, channels) for p in pictures])


def network_inputs(net: NetConfig, x: np.ndarray) -> np.ndarray:
    """Reshape examples [..., feature] to the inputs of a network: a cnn's are pictures."""
    return x.reshape(*x.shape[:-1], CNN_SIDE, CNN_SIDE, net.features) if net.kind == "cnn" else x


FEATURES = "features.safetensors"


@dataclass(frozen=True)
class Projection:
    """PCA of raw features, then one scale for all: features have a mean square of 1 on the classes it was fitted to.

    mean: [raw]; components: [raw, feature] f32, scale folded in.
    """

    backend: str
    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, backend: str, raw: np.ndarray, features: int) -> "Projection":
        if features > min(raw.shape):
            given = f"{raw.shape[0]} pictures with {raw.shape[1]} raw features"
            raise InputError(f"{features} features of {given}: ask for fewer")
        mean = raw.mean(0)
        _, values, rows = np.linalg.svd(raw - mean, full_matrices=False)
        scale = np.sqrt(len(raw) * features / np.sum(values[:features] ** 2))
        return cls(backend, mean.astype(np.float32), (rows[:features].T * scale).astype(np.float32))

    @classmethod
    def identity(cls, backend: str, features: int) -> "Projection":
        """Keep all features of unit vectors, such as embedded texts, scaled to a mean square of 1."""
        scale = np.float32(features**0.5)
        return cls(backend, np.zeros(features, np.float32), scale * np.eye(features, dtype=np.float32))

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        return ((raw - self.mean) @ self.components).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `features.safetensors` next to a generator's weights."""
        arrays = {"mean": self.mean, "components": self.components}
        save_file(arrays, folder / FEATURES, {"backend": self.backend})

    @classmethod
    def load(cls, folder: Path) -> "Projection":
        file = folder / FEATURES
        if not file.is_file():
            raise InputError(f"{folder} has no {FEATURES}: this generator has no encoder of pictures")
        with safe_open(file, framework="numpy") as opened:
            backend = opened.metadata()["backend"]
        return cls(backend, **load_file(file))


@dataclass(frozen=True)
class Bank:
    """Features by class. features: [picture, feature] f32, sorted by class; starts: [class + 1]; names: classes."""

    features: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, features: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> "Bank":
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels, minlength=len(names))
        if not counts.all():
            raise InputError(f"class {names[int(counts.argmin())]!r} has no picture here")
        return cls(np.ascontiguousarray(features[order]), np.concatenate([[0], np.cumsum(counts)]), tuple(names))

    @classmethod
    def numbers(cls, names: Sequence[str]) -> "Bank":
        """Build a bank of tasks known by their number, which is the only feature."""
        return cls.of(np.arange(len(names), dtype=np.float32)[:, None], np.arange(len(names)), names)

    def save(self, folder: Path, name: str = "bank") -> None:
        """Write `bank.npz` into a zoo's folder."""
        np.savez(folder / f"{name}.npz", features=self.features, starts=self.starts, names=np.array(self.names))

    @classmethod
    def load(cls, folder: Path, name: str = "bank") -> "Bank":
        """Raises InputError for a folder without one."""
        if not (folder / f"{name}.npz").is_file():
            raise InputError(f"{folder} has no {name}.npz: what its networks were trained on is missing; make it again")
        with np.load(folder / f"{name}.npz") as stored:
            return cls(stored["features"], stored["starts"], tuple(stored["names"].tolist()))

    @cached_property
    def counts(self) -> np.ndarray:
        return np.diff(self.starts)

    @cached_property
    def means(self) -> np.ndarray:
        """[class, feature] f32."""
        return np.stack([self.features[a:b].mean(0) for a, b in zip(self.starts, self.starts[1:], strict=False)])

    def draw(self, classes: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
        """Draw [..., shots, feature]: distinct pictures of each of `classes` [...], repeated if it has fewer."""
        counts = self.counts[classes]
        picks = np.zeros((*classes.shape, shots), np.int64)
        for k in range(shots):
            pick = (rng.random(classes.shape) * np.maximum(counts - k, 1)).astype(np.int64)
            for taken in np.moveaxis(np.sort(picks[..., :k], axis=-1), -1, 0):
                pick += pick >= taken  # the pick-th of those that are left
            picks[..., k] = pick
        picks = np.take_along_axis(picks, np.arange(shots) % np.minimum(counts, shots)[..., None], axis=-1)
        return self.features[self.starts[:-1][classes][..., None] + picks]

    def all(self, classes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Collect up to `most` pictures of each class, and labels 0 to ways - 1 with -1 in the padding.

        classes: [task, ways]. Returns [task, ways * most, feature] and [task, ways * most] int32.
        """
        tasks, ways = classes.shape
        at = self.starts[:-1][classes][..., None] + np.minimum(np.arange(most), self.counts[classes][..., None] - 1)
        mask = np.arange(most) < self.counts[classes][..., None]
        labels = np.where(mask, np.arange(ways)[:, None], -1)
        return self.features[at].reshape(tasks, ways * most, -1), labels.reshape(tasks, -1).astype(np.int32)


@dataclass(frozen=True)
class EmojiTasks:
    """The emoji by CLDR subgroup, split three ways by concept, some subgroups unseen by the zoo.

    Of each class the concepts are split into support, select and test: no concept is in two of them.
    seen, unseen: part -> bank. The zoo learns from the seen support pictures.
    """

    seen: dict[str, Bank]
    unseen: dict[str, Bank]
    projection: Projection


def emoji_tasks(backend: str, features: int = 64, held_out: int = 24, least: int = 6, seed: int = 0) -> EmojiTasks:
    """Read the embedded emoji. held_out: subgroups no zoo trains on; least: concepts of a subgroup to be a class."""
    source = open_source(SourceConfig(path="emoji", columns=("subgroup", "concept")))
    records = [source[i] for i in range(len(source))]
    concepts: dict[str, list[str]] = {}
    for record in records:
        members = concepts.setdefault(record["subgroup"], [])
        if record["concept"] not in members:
            members.append(record["concept"])
    names = sorted(name for name, members in concepts.items() if len(members) >= least)
    rng = np.random.default_rng(seed)
    order = [names[i] for i in rng.permutation(len(names))]
    groups = {"unseen": sorted(order[:held_out]), "seen": sorted(order[held_out:])}
    part_of: dict[str, str] = {}
    for name in names:
        members = [concepts[name][i] for i in rng.permutation(len(concepts[name]))]
        cuts = np.rint(np.cumsum([0.0, *SHARES.values()]) * len(members)).astype(int)
        for part, first, last in zip(SHARES, cuts, cuts[1:], strict=False):
            part_of |= {concept: part for concept in members[first:last]}

    kept = [r for r in records if r["subgroup"] in names]
    encode = encoder(backend)
    raw = encode(kept)
    seen = np.array([r["subgroup"] in groups["seen"] for r in kept])
    parts = np.array([part_of[r["concept"]] for r in kept])
    donor = seen & (parts == "support")
    projection = Projection.fit(backend, raw[donor], features)
    x = projection(raw)

    def bank(group: str, part: str) -> Bank:
        rows = np.flatnonzero((parts == part) & (seen == (group == "seen")))
        return Bank.of(x[rows], np.array([groups[group].index(kept[i]["subgroup"]) for i in rows]), groups[group])

    return EmojiTasks({p: bank("seen", p) for p in SHARES}, {p: bank("unseen", p) for p in SHARES}, projection)


def draw_tasks(classes: int, tasks: int, ways: int, rng: np.random.Generator) -> np.ndarray:
    """Draw [task, ways] int32: distinct classes in random order."""
    if classes < ways:
        raise InputError(f"{ways}-way tasks need {ways} classes, there are {classes}")
    return np.argsort(rng.random((tasks, classes)), axis=1)[:, :ways].astype(np.int32)

"""Scoring a CLIP on held-out pairs (retrieval) and on labelled pictures (zero-shot)"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import Donor
from heirloom.common.data.labelled import Labelled, open_labelled
from heirloom.common.data.lines import read_lines
from heirloom.common.data.pipeline import evaluation_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import Source, SourceConfig, open_source, per_picture
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.evaluate import imagenet
from heirloom.common.evaluate.features import embedder, finite
from heirloom.common.evaluate.retrieval import Recall, distinct, retrieval
from heirloom.common.evaluate.zeroshot import TEMPLATES, accuracy, classifier, read_templates
from heirloom.common.nn.functional import Functional
from heirloom.common.train.mesh import MeshConfig, start
from heirloom.common.train.parameters import load_params
from tinyclip_jax.inputs import preprocess_of, tokenizer_of
from tinyclip_jax.masks import Masked
from tinyclip_jax.model import ClipConfig

BATCH = 100
OPTIONS = ("--data", "--split", "--image", "--text", "--task", "--classes", "--templates", "--suite", "--beside", "--json")


@dataclass(frozen=True)
class Scored:
    """Metrics of one model on one data set of `n` pictures; classes: how many different labels they have, where they have labels."""

    dataset: str
    n: int
    metrics: Mapping[str, float]
    classes: int = 0

    def summary(self) -> dict[str, float]:
        """What a line of progress has room for: of retrieval the means of both directions."""
        means = {name: value for name, value in self.metrics.items() if "_to_" not in name}
        return means or dict(self.metrics)

    def rows(self) -> list[dict[str, Any]]:
        """One row per metric. Shares are in percent."""
        return [
            {"dataset": self.dataset, "metric": name, "value": 100 * value, "published": None, "n": self.n}
            for name, value in self.metrics.items()
        ]


Score = Callable[[Mapping[str, Any]], Scored]


@dataclass(frozen=True)
class Setup:
    """A model and what stands before it, on a mesh."""

    model: Functional | Masked
    pre: Preprocess
    tokenizer: Tokenizer
    cfg: ClipConfig
    mesh: Mesh

    def embed(self, tower: str, size: int = BATCH) -> Callable[[Mapping[str, Any], np.ndarray], np.ndarray]:
        """`(params, rows) -> features`: of pictures ("image") or of tokens ("text"). Raises InputError for NaN and infinite ones."""
        encode = embedder(lambda params, x: self.model.apply(params, x, method=f"encode_{tower}"), self.mesh, size)
        return lambda params, rows: finite(encode(params, rows), "the features of this model")


def setup_of(donor: Donor, mesh: Mesh) -> Setup:
    """Raises InputError when a checkpoint came without the tokenizer of its vocabulary."""
    tokenizer = tokenizer_of(donor)
    if tokenizer is None:
        raise InputError(f"{donor.path} has no tokenizer for its {donor.cfg.text.vocab} tokens; put tokenizer.json beside the weights")
    return Setup(donor.model, preprocess_of(donor).announced(), tokenizer, donor.cfg, mesh)


def retrieval_on(
    data: SourceConfig, model: Functional | Masked, pre: Preprocess, tokenizer: Tokenizer, cfg: ClipConfig, mesh: Mesh
) -> Score:
    """`retrieval_over` of what a config names. Raises InputError when the data cannot be read."""
    return retrieval_over(_name(data), open_source(data), Setup(model, pre, tokenizer, cfg, mesh))


def retrieval_over(name: str, source: Source, setup: Setup) -> Score:
    """`params -> Scored`: recall at 1, 5, 10 both ways. Pictures of one `concept` share their captions; else each has its own.

    In a table with a row per caption a picture counts once, with the captions of all its rows. A caption that a picture has
    twice is asked for twice, as in CLIP_benchmark; one that pictures of a concept share, once. Raises InputError when the data
    has no captions.
    """
    first = source[0]
    for part, what in (("image", "picture"), ("text", "caption")):
        if part not in first:
            raise InputError(f"{first['key']} has no {what}; retrieval needs pairs, name the column with --{part}")
    by_concept = "concept" in first
    source = source if by_concept else per_picture(source, name)
    image, text = setup.embed("image"), setup.embed("text")

    def score(params: Mapping[str, Any]) -> Scored:
        batches = evaluation_batches(source, BATCH, setup.pre, setup.tokenizer, setup.cfg.text.context)
        seen = 0
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "image_group", "tokens", "text_group")}
        for batch in batches:
            group = batch.get("concept", np.arange(seen, seen + len(batch["image"])))
            parts["image"].append(image(params, batch["image"]))
            parts["image_group"].append(group)
            parts["tokens"].append(batch["text"])
            parts["text_group"].append(group[batch["owner"] - seen])
            seen += len(batch["image"])
        columns = {name: np.concatenate(values) for name, values in parts.items()}
        once = distinct(columns["text_group"], columns["tokens"]) if by_concept else np.arange(len(columns["tokens"]))
        tokens = columns["tokens"][once]
        captions = np.concatenate([text(params, tokens[i : i + BATCH]) for i in range(0, len(tokens), BATCH)])
        recall: Recall = retrieval(columns["image"], captions, columns["image_group"], columns["text_group"][once])
        return Scored(name, seen, recall.flat())

    return score


def zeroshot_over(name: str, source: Source, setup: Setup, classes: tuple[str, ...], templates: tuple[str, ...] = TEMPLATES) -> Score:
    """`params -> Scored`: top-1 and top-5 over the classes of labelled pictures, by name in the order of their labels.

    Raises InputError when the data has no labels.
    """

    def score(params: Mapping[str, Any]) -> Scored:
        features, labels = features_of(name, source, setup, params)
        return zeroshot(name, features, labels, setup, params, classes, templates)

    return score


def zeroshot(
    name: str,
    features: np.ndarray,
    labels: np.ndarray,
    setup: Setup,
    params: Mapping[str, Any],
    classes: tuple[str, ...],
    templates: tuple[str, ...],
) -> Scored:
    """The same over features that are there: [n, joint] f32 with labels [n] int."""
    text = setup.embed("text", max(BATCH, len(templates)))
    vectors = classifier(classes, templates, lambda captions: text(params, setup.tokenizer(captions, setup.cfg.text.context)))
    found = accuracy(features, vectors, labels)
    return Scored(name, len(labels), {"top1": found.top1, "top5": found.top5}, len(np.unique(labels)))


def features_of(name: str, source: Source, setup: Setup, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, joint] f32 of labelled pictures, and their labels [n]. Raises InputError when the data has no labels."""
    image = setup.embed("image")
    features, labels = [], []
    for batch in evaluation_batches(source, BATCH, setup.pre):
        if "label" not in batch:
            raise InputError(f"{name} has no labels: zero-shot needs a folder per class, or a column `label`")
        features.append(image(params, batch["image"]))
        labels.append(batch["label"])
    return np.concatenate(features), np.concatenate(labels)


def _name(data: SourceConfig) -> str:
    return f"{data.path}/{data.split}" if data.split else data.path


def no_flags(args: Namespace) -> None:
    """Raises InputError for an argument that `heirloom eval` does not have: weights have no recipe whose fields could be set."""
    if args.flags:
        raise InputError(f"unknown argument {args.flags[0]!r}{nearest(args.flags[0], OPTIONS)}; see heirloom eval --help")


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Rows of `heirloom eval PATH` on the data its arguments name. Raises InputError for data or files that are not there."""
    no_flags(args)
    args.data = args.data or "emoji"
    split = args.split or ("test" if args.data.split(":")[0] == "emoji" else "")
    mesh = start(MeshConfig())
    setup = setup_of(donor, mesh)
    if args.task == "retrieval":
        data = SourceConfig(args.data, split, args.image, args.text)
        score = retrieval_over(_name(data), open_source(data), setup)
    else:
        data = SourceConfig(args.data, split, args.image, text="")
        classes = _class_names(args.classes)
        source = open_labelled(data, "label", len(classes) or None, _synonyms(args.classes, classes) or None)
        classes = classes or source.classes
        if not classes:
            raise InputError(f"{data.path} names no classes: give --classes, a file with one name a line")
        score = zeroshot_over(_name(data), source, setup, classes, _templates(args.templates, source))
    return score(load_params(donor, mesh)).rows()


def _class_names(file: Path | None) -> tuple[str, ...]:
    """A name a line; `imagenet` is what comes with this package."""
    if file is None:
        return ()
    return tuple(name for _, name in imagenet.CLASSES) if str(file) == "imagenet" else read_lines(file)


def _synonyms(file: Path | None, classes: tuple[str, ...]) -> tuple[str, ...]:
    """What data may call the classes: for ImageNet's, their WordNet identifiers as well."""
    return tuple(f"{identifier}, {name}" for identifier, name in imagenet.CLASSES) if str(file) == "imagenet" else classes


def _templates(file: Path | None, source: Labelled) -> tuple[str, ...]:
    """Those of a file, or that come with the data, or the plain one."""
    if file is None and (companion := getattr(source.source, "templates", None)):
        remark(f"templates from {companion}; --templates takes others")
        return read_templates(companion)
    if file is None:
        return TEMPLATES
    return imagenet.TEMPLATES if str(file) == "imagenet" else read_templates(file)

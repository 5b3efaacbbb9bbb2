"""Score a CLIP on held-out pairs (retrieval) and on labelled pictures (zero-shot)."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from heirloom.common.checkpoint.family import Donor
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
from heirloom.common.evaluate.scored import Score, Scored
from heirloom.common.evaluate.zeroshot import TEMPLATES, accuracy, classifier, read_templates
from heirloom.common.train.mesh import MeshConfig, start
from heirloom.common.train.parameters import load_params
from heirloom.common.train.parts import Model
from tinyclip_jax.inputs import preprocess_of, tokenizer_of
from tinyclip_jax.model import ClipConfig

BATCH = 100
OPTIONS: tuple[str, ...] = ("--data", "--split", "--image", "--text", "--task")
OPTIONS += ("--classes", "--templates", "--suite", "--beside", "--json")


@dataclass(frozen=True)
class Setup:
    """A CLIP with its tokenizer and preprocessing, on a mesh."""

    model: Model
    pre: Preprocess
    tokenizer: Tokenizer
    cfg: ClipConfig
    mesh: Mesh

    def embed(self, tower: str, size: int = BATCH) -> Callable[[Mapping[str, Any], np.ndarray], np.ndarray]:
        """Returns `(params, rows) -> features` for pictures (tower "image") or tokens ("text").

        The function raises InputError for features that are NaN or infinite.
        """
        encode = embedder(lambda params, x: self.model.apply(params, x, method=f"encode_{tower}"), self.mesh, size)
        return lambda params, rows: finite(encode(params, rows), "the features of this model")


def setup_of(donor: Donor, mesh: Mesh) -> Setup:
    """Set up a checkpoint for evaluation. Raises InputError when it has no tokenizer for its vocabulary."""
    tokenizer = tokenizer_of(donor)
    if tokenizer is None:
        tokens = donor.cfg.text.vocab
        raise InputError(f"{donor.path} has no tokenizer for {tokens} tokens: put tokenizer.json next to the weights")
    pre = preprocess_of(donor).announced()
    return Setup(model=donor.model, pre=pre, tokenizer=tokenizer, cfg=donor.cfg, mesh=mesh)


def retrieval_on(
    data: SourceConfig, model: Model, pre: Preprocess, tokenizer: Tokenizer, cfg: ClipConfig, mesh: Mesh
) -> Score:
    """`retrieval_over` for the data that a config names. Raises InputError when the data cannot be read."""
    setup = Setup(model=model, pre=pre, tokenizer=tokenizer, cfg=cfg, mesh=mesh)
    return retrieval_over(_name(data), open_source(data), setup)


def retrieval_over(name: str, source: Source, setup: Setup) -> Score:
    """Returns `params -> Scored`: recall at 1, 5, 10 in both directions.

    Pictures of one `concept` share their captions; without concepts each picture has its own. In a table with a row per
    caption, a picture counts once, with the captions of all its rows. A caption that one picture has twice is queried
    twice, as in CLIP_benchmark; a caption that pictures of a concept share is queried once. Raises InputError when the
    data has no captions.
    """
    first = source[0]
    for part, what in (("image", "picture"), ("text", "caption")):
        if part not in first:
            raise InputError(f"{first['key']} has no {what}, and retrieval needs pairs: name the column with --{part}")
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


def zeroshot_over(
    name: str, source: Source, setup: Setup, classes: tuple[str, ...], templates: tuple[str, ...] = TEMPLATES
) -> Score:
    """Returns `params -> Scored`: zero-shot top-1, top-5 on labelled pictures. classes: a name per label, in order.

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
    """Zero-shot top-1 and top-5 of computed features: [n, joint] f32 with labels [n] int."""
    text = setup.embed("text", max(BATCH, len(templates)))
    vectors = classifier(
        classes, templates, lambda captions: text(params, setup.tokenizer(captions, setup.cfg.text.context))
    )
    found = accuracy(features, vectors, labels)
    metrics = {"top1": found.top1, "top5": found.top5}
    return Scored(dataset=name, n=len(labels), metrics=metrics, classes=len(np.unique(labels)))


def features_of(name: str, source: Source, setup: Setup, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, joint] f32 of labelled pictures, and labels [n]. Raises InputError for data without labels."""
    image = setup.embed("image")
    features, labels = [], []
    for batch in evaluation_batches(source, BATCH, setup.pre):
        if "label" not in batch:
            raise InputError(f"{name} has no labels: zero-shot needs a folder for each class, or a column `label`")
        features.append(image(params, batch["image"]))
        labels.append(batch["label"])
    return np.concatenate(features), np.concatenate(labels)


def _name(data: SourceConfig) -> str:
    return f"{data.path}/{data.split}" if data.split else data.path


def refuse_flags(args: Namespace) -> None:
    """Raises InputError for a recipe flag: `heirloom eval` of weights has no recipe whose fields it could set."""
    if args.flags:
        unknown = args.flags[0]
        raise InputError(f"unknown argument {unknown!r}{nearest(unknown, OPTIONS)}; see heirloom eval --help")


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Rows of `heirloom eval PATH` on the data its arguments name. Raises InputError for missing data or files."""
    refuse_flags(args)
    args.data = args.data or "emoji"
    split = args.split or ("test" if args.data.split(":")[0] == "emoji" else "")
    mesh = start(MeshConfig())
    setup = setup_of(donor, mesh)
    if args.task == "retrieval":
        data = SourceConfig(path=args.data, split=split, image=args.image, text=args.text)
        score = retrieval_over(_name(data), open_source(data), setup)
    else:
        data = SourceConfig(path=args.data, split=split, image=args.image, text="")
        classes = _class_names(args.classes)
        source = open_labelled(data, "label", len(classes) or None, _synonyms(args.classes, classes) or None)
        classes = classes or source.classes
        if not classes:
            raise InputError(f"{data.path} names no classes: give --classes FILE, with one name per line")
        score = zeroshot_over(_name(data), source, setup, classes, _templates(args.templates, source))
    return score(load_params(donor, mesh)).rows()


def _class_names(file: Path | None) -> tuple[str, ...]:
    """Read class names, one per line; `imagenet` is the list in this package."""
    if file is None:
        return ()
    return tuple(name for _, name in imagenet.CLASSES) if str(file) == "imagenet" else read_lines(file)


def _synonyms(file: Path | None, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the classes in data; for ImageNet, with their WordNet identifiers."""
    if str(file) != "imagenet":
        return classes
    return tuple(f"{identifier}, {name}" for identifier, name in imagenet.CLASSES)


def _templates(file: Path | None, source: Labelled) -> tuple[str, ...]:
    """Prompt templates: of a file, else of the data, else the default."""
    if file is None and (sidecar := getattr(source.source, "templates", None)):
        remark(f"templates from {sidecar}; --templates takes others")
        return read_templates(sidecar)
    if file is None:
        return TEMPLATES
    return imagenet.TEMPLATES if str(file) == "imagenet" else read_templates(file)

"""Score a CLIP on held-out pairs (retrieval) and on labelled pictures (zero-shot)."""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from heirloom.common import config
from heirloom.common.arguments import arguments_of
from heirloom.common.checkpoint.family import Donor
from heirloom.common.data import imagenet
from heirloom.common.data.class_names import as_words
from heirloom.common.data.labelled import Labelled, open_labelled
from heirloom.common.data.lines import read_lines
from heirloom.common.data.pipeline import evaluation_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import FolderSource, Source, SourceConfig, TarSource, open_source, per_picture
from heirloom.common.data.tokenizer_files import CaptionTokenizer
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.evaluate.features import embedder, finite
from heirloom.common.evaluate.retrieval import Recall, ambiguous, distinct, retrieval
from heirloom.common.evaluate.scored import Score, Scored
from heirloom.common.evaluate.zeroshot import (
    TEMPLATES,
    accuracy,
    check_templates,
    classifier,
    read_templates,
)
from heirloom.common.mesh import start
from heirloom.common.notebook.modules import make_callable
from heirloom.common.train.parameters import load_params
from heirloom.common.train.parts import Model
from tinyclip_jax.inputs import preprocess_of, tokenizer_of
from tinyclip_jax.model import ClipConfig

BATCH = 100
TASKS = ("retrieval", "zeroshot")
WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Setup:
    """A CLIP with its tokenizer and preprocessing, on a mesh."""

    model: Model
    pre: Preprocess
    tokenizer: CaptionTokenizer
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
            needed = f"name the column with --{part}"
            if isinstance(source, FolderSource):  # metadata.csv is that of Hugging Face's imagefolder
                needed = "put a .txt next to each picture, or give a .csv (metadata.csv --image file_name --text text)"
            raise InputError(f"{first['key']} has no {what}, and retrieval needs pairs: {needed}")
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
        if shared := ambiguous(columns["text_group"][once], tokens):
            right = "only the picture's own copy counts as correct, and a tie as wrong"
            remark(f"{name}: {shared:,} of {len(tokens):,} captions occur with several pictures: {right}")
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


def refuse_flags(args: Namespace, known: Sequence[str] = ()) -> None:
    """Raises InputError for a recipe flag but `known`: `heirloom eval` of weights has no recipe to set a field of."""
    names = [flag.partition("=")[0] for flag in args.flags if flag.startswith("-")] or args.flags
    if unknown := next((name for name in names if name not in known), ""):
        options = {name for argument in arguments_of("eval") for name in argument.names} | {"--label", "--json"}
        raise InputError(f"unknown argument {unknown!r}{nearest(unknown, options)}; see heirloom eval --help")


@dataclass(frozen=True)
class EvalConfig:
    """Fields of `heirloom eval PATH --task zeroshot` for a CLIP."""

    label: str = "label"
    """Column of the class: numbers from 0, or names."""


@dataclass(frozen=True)
class Words:
    """Names of classes and prompt templates for zero-shot; empty: those of the data, or the default templates.

    synonyms: what data may call each class, where that differs.
    """

    classes: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    @classmethod
    def of(cls, classes: Sequence[str] | None, templates: Sequence[str] | None) -> "Words":
        """Returns given lists; the word `imagenet` stands for the lists in this package, for ImageNet with WordNet's
        identifiers.
        """
        for what, given in (("classes", classes), ("templates", templates)):
            if isinstance(given, str) and given != "imagenet":
                raise InputError(f"{what} is the text {given[:40]!r}: give a list of strings, or the word imagenet")
        names = synonyms = tuple(classes or ())
        if classes == "imagenet":
            names = tuple(name for _, name in imagenet.CLASSES)
            synonyms = tuple(f"{name}, {identifier}" for identifier, name in imagenet.CLASSES)
        if templates == "imagenet":
            return cls(names, synonyms, imagenet.TEMPLATES)
        return cls(names, synonyms, check_templates(templates or (), "template"))

    @classmethod
    def read(cls, classes: Path | None, templates: Path | None) -> "Words":
        """Reads both lists from files, one name or template per line; or `imagenet`."""
        named = "imagenet" if str(classes) == "imagenet" else read_lines(classes) if classes else None
        given = "imagenet" if str(templates) == "imagenet" else read_templates(templates) if templates else None
        return cls.of(named, given)


def score_on(data: SourceConfig, task: str, setup: Setup, words: Words, label: str = "label") -> Score:
    """Returns `params -> Scored` for retrieval or zeroshot on the data that a config names. label: column of the class.

    Raises InputError for data that cannot be read, zero-shot without names of classes, and retrieval with names.
    """
    if task == "retrieval":
        given = {"classes": words.classes, "templates": words.templates, "label": label != "label"}
        if unused := next((name for name, value in given.items() if value), ""):
            raise InputError(f"{unused} has no effect on retrieval: set task to zeroshot, or leave it out")
        return retrieval_over(_name(data), open_source(data), setup)
    if task != "zeroshot":
        raise InputError(f"no task {task!r}{nearest(task, TASKS)} (there are {', '.join(TASKS)})")
    if data.text not in ("", SourceConfig.text):
        raise InputError("text has no effect on zeroshot: set task to retrieval, or leave it out")
    data = replace(data, text="")
    source = open_labelled(data, label, len(words.classes) or None, words.synonyms or None)
    templates = words.templates or _templates(source)
    classes = words.classes or _named(source, data.path, templates[0])
    if not classes:
        raise InputError(f"{data.path} names no classes: give --classes FILE, with one name per line")
    if not words.classes and all(WORDNET.fullmatch(name) for name in classes):
        codes = f"{data.path}: class names are WordNet ids ({classes[0]} ...), which cannot be used in prompts"
        raise InputError(f"{codes}: give --classes imagenet, or a list of your own")
    if not words.classes and all(name.isdecimal() for name in classes):
        remark(f"{data.path}: prompts are made of the numbers {classes[0]} to {classes[-1]}; --classes FILE names them")
    if len(classes) == 1:
        raise InputError(f"{data.path} has one class, {classes[0]!r}, which is always right: give data of several")
    if doubled := [name for name, n in Counter(classes).items() if n > 1]:
        effect = "their pictures are never in the top 1, because a tie counts against the right class"
        remark(f"several of the {len(classes)} classes are called {doubled[0]!r}: {effect}")
    return zeroshot_over(_name(data), source, setup, classes, templates)


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Rows of `heirloom eval PATH` on the data its arguments name. Raises InputError for missing data or files."""
    refuse_flags(args, ("--label",))
    cfg = config.parse(EvalConfig(), args.flags, f"heirloom eval {donor.path}")
    args.data = args.data or "emoji"
    split = args.split or ("test" if args.data.split(":")[0] == "emoji" else "")
    mesh = start()
    setup = setup_of(donor, mesh)
    data = SourceConfig(path=args.data, split=split, image=args.image, text=args.text)
    score = score_on(data, args.task, setup, Words.read(args.classes, args.templates), cfg.label)
    return score(load_params(donor, mesh)).rows()


def _named(source: Labelled, path: str, template: str) -> tuple[str, ...]:
    """Names for prompts of the classes of data: words for folders and columns, which a remark shows; classnames.txt as
    it is.
    """
    if isinstance(source.source, TarSource) and source.source.class_names:
        return source.classes
    names = as_words(source.classes)
    if names:
        listed = any("," in name for name in names)
        # The pair that says most: synonyms in one prompt, else words that were changed.
        old, new = max(zip(source.classes, names, strict=True), key=lambda pair: ("," in pair[1], pair[0] != pair[1]))
        way = "takes one of the synonyms, and so does --classes imagenet" if listed else "takes other names"
        remark(f"{path}: the prompt of class {old!r} is {template.replace('{}', new)!r}; --classes FILE {way}")
    return names


def _templates(source: Labelled) -> tuple[str, ...]:
    """Prompt templates that come with the data, else the default."""
    if sidecar := getattr(source.source, "templates", None):
        remark(f"using templates from {sidecar}; override them with --templates")
        return read_templates(sidecar)
    return TEMPLATES


make_callable(__name__, "tinyclip_jax.pretrained:evaluate")

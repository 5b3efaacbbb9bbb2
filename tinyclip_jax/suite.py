"""Evaluation suite: score every data set of a folder by its protocol, next to published numbers.

A folder DIR holds some of these:

    DIR/imagenet/ imagenet-a/ imagenet-r/ imagenet-sketch/   a folder per class, named by WordNet identifier (n01440764)
    DIR/imagenet-v2/                                         a folder per class, named by number (0 to 999)
    DIR/objectnet/images/ and mappings/                      as objectnet.dev distributes it
    DIR/flickr30k/ coco/                                     Karpathy's dataset_*.json, and its pictures under images/
    DIR/cifar10/ fashion-mnist/                              train/ and test/ with image.npy and label.npy
    DIR/openclipart/                                         parquet with image and caption

scripts/make_suite.py makes cifar10, fashion-mnist and openclipart; data sets that are missing are listed. Each of them
except ObjectNet may also have another form that `heirloom eval --data` reads: webdataset shards of CLIP_benchmark,
parquet files of Hugging Face, one table of paths and captions. If there are several splits, `test` is used, else `val`
or `validation`; of ImageNet, whose test split has no labels, `val` or `validation` first.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from heirloom.common.arguments import refuse
from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.imagenet import CLASSES, TEMPLATES, is_class_list
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.pictures import decode_record
from heirloom.common.data.sources import FolderSource, Record, SourceConfig, captions, open_source
from heirloom.common.data.sources.record import read
from heirloom.common.data.sources.splits import split_of
from heirloom.common.errors import InputError, remark
from heirloom.common.evaluate.probe import probe
from heirloom.common.evaluate.zeroshot import TEMPLATES as PLAIN
from heirloom.common.files import read_json
from heirloom.common.mesh import start
from heirloom.common.train.parameters import load_params
from heirloom.common.train.step import cast
from tinyclip_jax.cost import parameters
from tinyclip_jax.evaluate import (
    Scored,
    Setup,
    features_of,
    refuse_flags,
    retrieval_over,
    setup_of,
    zeroshot,
    zeroshot_over,
)
from tinyclip_jax.published import PUBLISHED, Published

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LABELLED = SourceConfig(text="", columns=("label",))
CLASSES_OF = {"imagenet": 1000, "imagenet-v2": 1000, "imagenet-a": 200, "imagenet-r": 200}
CLASSES_OF |= {"imagenet-sketch": 1000, "objectnet": 313}
IMAGENET_SPLITS = ("val", "validation", "test")  # its test split has no labels
BORDER = 2  # pixels of a red frame that ObjectNet has against training on it
OF_ONE_SET = {"data", "split", "image", "text", "task", "classes", "templates"}  # arguments of `heirloom eval`
WARM_UP, TIMED = 10, 50  # calls before and during the measurement of throughput
THROUGHPUT_BATCH = 32  # examples in each

Scores = Callable[[Setup, Mapping[str, Any], Path], Scored]


def _imagenet(name: str, setup: Setup, params: Mapping[str, Any], folder: Path) -> Scored:
    """Zero-shot over the classes that have folders; published numbers compare only if all `CLASSES_OF` do."""
    source = open_labelled(_of_test(folder, IMAGENET_SPLITS), "label")
    by_identifier = dict(CLASSES)
    by_number = {str(i): label for i, (_, label) in enumerate(CLASSES)}
    names = by_number if name == "imagenet-v2" else by_identifier
    if not isinstance(source.source, FolderSource):
        if not source.classes and CLASSES_OF[name] < len(CLASSES):
            needed = f"the {CLASSES_OF[name]} classes of its labels"
            raise InputError(f"{folder} does not name {needed}: put classnames.txt next to the shards")
        classes = source.classes or tuple(by_identifier.values())
        if is_class_list(classes):
            classes = tuple(by_identifier.values())
        elif listed := next((c for c in classes if "," in c), ""):
            other = "published numbers use one name for each class"
            remark(f"{folder}: class names are lists of synonyms ({listed!r}) and are used as such in prompts; {other}")
        return zeroshot_over(name, source, setup, classes, TEMPLATES)(params)
    if unknown := [c for c in source.classes if c not in names]:
        named = "name it like n01440764 or, in imagenet-v2, 0 to 999"
        raise InputError(f"{folder}: the folder {unknown[0]!r} is no class of ImageNet: {named}")
    return zeroshot_over(name, source, setup, tuple(names[c] for c in source.classes), TEMPLATES)(params)


def _objectnet(name: str, setup: Setup, params: Mapping[str, Any], folder: Path) -> Scored:
    """Zero-shot over the classes that are also in ImageNet, with the names of ObjectNet."""
    label = read_json(folder / "mappings" / "folder_to_objectnet_label.json")
    shared = read_json(folder / "mappings" / "objectnet_to_imagenet_1k.json")
    source = FolderSource(folder / "images", LABELLED)
    kept = [i for i, c in enumerate(source.classes) if label.get(c) in shared]
    if not kept:
        needed = "no folder is a class that the mappings share with ImageNet"
        raise InputError(f"{folder / 'images'}: {needed}; give the folders of objectnet.dev")
    names = tuple(label[source.classes[i]].lower() for i in kept)
    return zeroshot_over(name, ObjectNet(source, kept), setup, names, TEMPLATES)(params)


class ObjectNet:
    """The pictures of the classes `kept`, with labels 0, 1, ... in this order, without the red border of 2 pixels."""

    def __init__(self, source: FolderSource, kept: Sequence[int]):
        self._source, self._number = source, {label: i for i, label in enumerate(kept)}
        self._rows = [i for i in range(len(source)) if source.label(i) in self._number]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        record = self._source[self._rows[index]]
        pixels = np.asarray(decode_record(record))[BORDER:-BORDER, BORDER:-BORDER]
        return record | {"image": pixels, "label": np.int32(self._number[int(record["label"])])}


class Karpathy:
    """Pictures of a split of Karpathy's dataset_*.json, each with its first five captions."""

    def __init__(self, folder: Path, split: str = "test"):
        files = sorted(folder.glob("dataset*.json"))
        if len(files) != 1:
            raise InputError(f"{folder} has {len(files)} files dataset_*.json of Karpathy's splits: it needs one")
        self._root = folder / "images"
        try:
            self._images = [image for image in read_json(files[0])["images"] if image["split"] == split]
            texts = [
                ([sentence["raw"] for sentence in image["sentences"]], image["filename"]) for image in self._images
            ]
        except (KeyError, TypeError) as error:
            raise InputError(f"{files[0]} is not a file of Karpathy's splits: {error} is missing in it") from error
        if not self._images:
            raise InputError(f"{files[0]} has no picture of split {split!r}")
        for text, name in texts:
            captions(text, f"{files[0]}: {name}")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        image = self._images[index]
        file = self._root / image.get("filepath", "") / image["filename"]
        return Record(key=str(file), image=read(file), text=[sentence["raw"] for sentence in image["sentences"][:5]])


def _karpathy(name: str, setup: Setup, params: Mapping[str, Any], folder: Path) -> Scored:
    """Retrieval over pictures with five captions each, from Karpathy's split or from pairs."""
    if not any(folder.glob("dataset*.json")) and not (folder / "images").is_dir():
        return _pairs(name, setup, params, folder)
    return retrieval_over(name, Karpathy(folder), setup)(params)


def _pairs(name: str, setup: Setup, params: Mapping[str, Any], folder: Path) -> Scored:
    return retrieval_over(name, open_source(_of_test(folder)), setup)(params)


def _of_test(folder: Path, splits: Sequence[str] = ("test", "val", "validation")) -> SourceConfig:
    """The first of `splits` that sub-folders or files are named as; the table, where there is exactly one."""
    tables = [*folder.glob("*.csv"), *folder.glob("*.tsv")]
    named = {split_of(file) for files in ("*.parquet", "data/*.parquet", "*.tar") for file in folder.glob(files)}
    for split in splits:
        if (folder / split).is_dir() or split in named:
            return SourceConfig(str(folder), split)
    return SourceConfig(str(tables[0] if len(tables) == 1 else folder))


def _small(classes: tuple[str, ...], name: str, setup: Setup, params: Mapping[str, Any], folder: Path) -> Scored:
    """Zero-shot on the test pictures, and a linear probe that is trained on the training pictures."""
    splits = (SourceConfig(str(folder), split) for split in ("train", "test"))
    sources = (open_labelled(split, "label", len(classes), classes) for split in splits)
    (x, y), (test_x, test_y) = (features_of(name, source, setup, params) for source in sources)
    scored = zeroshot(name, test_x, test_y, setup, params, classes, PLAIN)
    return replace(scored, metrics={**scored.metrics, "linear_probe": probe(x, y, test_x, test_y).top1})


SUITE: dict[str, Scores] = {
    **{
        name: partial(_imagenet, name)
        for name in ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch")
    },
    "objectnet": partial(_objectnet, "objectnet"),
    **{name: partial(_karpathy, name) for name in ("flickr30k", "coco")},
    "cifar10": partial(_small, CIFAR10, "cifar10"),
    "fashion-mnist": partial(_small, FASHION, "fashion-mnist"),
    "openclipart": partial(_pairs, "openclipart"),
}


def evaluate_suite(donor: Donor, baseline: Donor | None, args: Namespace) -> list[dict[str, Any]]:
    """Rows of `heirloom eval PATH --suite DIR`."""
    refuse_flags(args)
    refuse(args, "eval", OF_ONE_SET, "data sets of a suite have their own settings, and", "is for one data set")
    return run_suite(donor, baseline, args.suite)


def run_suite(donor: Donor, baseline: Donor | None, folder: Path) -> list[dict[str, Any]]:
    """Score every data set in `folder`, a row each, with value None for a missing one.

    Rows are {dataset, metric, value, beside, published, published_of, n}.

    baseline: another model, such as the teacher, scored on the same data; its score is the column `beside`. published:
    score of the published model of this size, which `published_of` names; left out for a data set that lacks classes.
    Raises InputError when the folder holds no data set of the suite, or an invalid one.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one that holds data sets named {', '.join(SUITE)}")
    folders = (path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if unknown := sorted(name for name in folders if name not in SUITE):
        move = f"rename or move it (names are {', '.join(SUITE)})"
        raise InputError(f"{folder / unknown[0]}: no data set of the suite has this name: {move}")
    present = [name for name in SUITE if (folder / name).is_dir()]
    if not present:
        raise InputError(f"{folder} holds no data set of the suite: name its folders {', '.join(SUITE)}")
    mesh = start()
    models = [_score_all(model, present, folder, mesh) for model in (donor, baseline) if model]
    published = published_for(donor)
    rows: list[dict[str, Any]] = []

    def add(dataset: str, metric: str, value: float | None, n: int, classes: int = 0, **more: Any) -> None:
        whole = classes >= CLASSES_OF.get(dataset, 0)
        known = published.numbers.get(f"{dataset}/{metric}") if published and whole else None
        reference = {"published": known} | ({"published_of": published.name} if published and known is not None else {})
        rows.append({"dataset": dataset, "metric": metric, "value": value, "n": n} | reference | more)

    for (dataset, metric), measured in models[0].items():
        other = {"beside": models[1][dataset, metric].value} if baseline else {}
        add(dataset, metric, measured.value, measured.n, measured.classes, **other)
    for name in SUITE:
        if name not in present:
            add(name, "missing", None, 0)
    return rows


@dataclass(frozen=True)
class Measured:
    """One number of a report, percent or examples per second. n: examples. classes: distinct labels, 0 for none."""

    value: float
    n: int
    classes: int = 0


def _score_all(donor: Donor, names: Sequence[str], folder: Path, mesh: Mesh) -> dict[tuple[str, str], Measured]:
    params, setup = load_params(donor, mesh), setup_of(donor, mesh)
    out: dict[tuple[str, str], Measured] = {}
    for name in names:
        scored = SUITE[name](setup, params, folder / name)
        for metric, value in scored.metrics.items():
            out[name, metric] = Measured(100 * value, scored.n, scored.classes)
    rates, n = throughput(setup, params), TIMED * THROUGHPUT_BATCH
    return out | {("throughput", name): Measured(rate, n) for name, rate in rates.items()}


def throughput(setup: Setup, params: Mapping[str, Any]) -> dict[str, float]:
    """Measure images, captions and pairs per second: batches of 32, ten calls to warm up, fifty timed, bfloat16.

    Deviation: on a CPU, where half precision is slower, in float32.
    """
    c = setup.cfg
    params = cast(dict(params), "float32" if jax.default_backend() == "cpu" else "bfloat16")
    image = np.zeros((THROUGHPUT_BATCH, c.image.size, c.image.size, 3), np.float32)
    inputs = {"image": image, "text": np.ones((THROUGHPUT_BATCH, c.text.context), np.int32)}
    rates = {}
    for tower, batch in inputs.items():
        encode = jax.jit(partial(setup.model.apply, method=f"encode_{tower}"))
        for _ in range(WARM_UP):
            jax.block_until_ready(encode(params, batch))
        started = time.perf_counter()
        for _ in range(TIMED):
            jax.block_until_ready(encode(params, batch))
        rates[f"{tower}s_per_second"] = TIMED * THROUGHPUT_BATCH / (time.perf_counter() - started)
    return rates | {"pairs_per_second": 1 / sum(1 / rate for rate in rates.values())}


def published_for(donor: Donor) -> Published | None:
    """The published model of this size, if there is one. It may have been trained on other data."""
    counts = parameters(donor.source.spec)
    return PUBLISHED.get((round(counts["image"] / 1e6), round(counts["text"] / 1e6)))

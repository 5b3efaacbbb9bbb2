"""The evaluation suite on folders as they come: which protocol, which classes, what is missing."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.cli import main
from heirloom.common.data.class_names import match
from heirloom.common.data.imagenet import CLASSES, TEMPLATES, is_class_list
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import FolderSource
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.evaluate.probe import probe
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.train.parameters import load_params
from tinyclip_jax import suite
from tinyclip_jax.evaluate import Words, setup_of
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.pretrained import Pretrained
from tinyclip_jax.published import Published

CFG = ClipConfig(
    ImageConfig(size=8, patch=8, width=16, layers=1, heads=2, hidden=16),
    TextConfig(context=8, vocab=540, width=16, layers=1, heads=2, hidden=16),
    joint=8,
)


def test_imagenet_is_whole():
    assert len(CLASSES) == len(dict(CLASSES)) == 1000 and len(TEMPLATES) == 80
    assert CLASSES[0] == ("n01440764", "tench") and CLASSES[999][1] == "toilet paper"
    assert [i for i, _ in CLASSES] == sorted(i for i, _ in CLASSES)
    assert all(t.count("{}") == 1 for t in TEMPLATES)


def test_the_class_list_of_imagenet_is_known_by_first_synonyms():
    theirs = [f"{name}, Latin name {i}" if i % 3 else f"other {i}" for i, (_, name) in enumerate(CLASSES)]
    assert is_class_list(theirs) and is_class_list([name for _, name in CLASSES])
    assert not is_class_list(theirs[:200]) and not is_class_list(sorted(theirs))
    # "gong" is the first synonym of one class and the last of another, which is called "wind chime" here.
    assert match(["chime, bell, gong", "gong, tam-tam"], Words.of("imagenet", None).synonyms) == [None, 577]


def test_the_probe_separates_what_can_be_and_chooses_its_strength():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = (np.eye(3)[labels] + 0.2 * rng.standard_normal((300, 3))).astype(np.float32)
    found = probe(features[:200], labels[:200], features[200:], labels[200:], strengths=(1e-3, 1e3))
    assert found.top1 > 0.97 and found.strength == 1e-3
    assert probe(features[:200], labels[:200], features[200:], rng.permutation(labels[200:])).top1 < 0.6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    clip = functional(Clip, CFG)
    Pretrained(
        CFG, clip, clip.init(jax.random.key(0)), Preprocess(8), Tokenizer.train(["a photo of a tench"], 540)
    ).save(folder)
    return folder


def picture(file, shade):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four of the suite's data sets, tiny."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i, identifier in enumerate(("n01440764", "n01443537", "n15075141")):
        picture(root / "imagenet-a" / identifier / "0.png", 60 * i)
    for number in (0, 2, 10):
        picture(root / "imagenet-v2" / str(number) / "0.png", 20 * number)
    images = [
        {
            "filename": f"{i}.png",
            "split": "test" if i else "train",
            "sentences": [{"raw": f"no {i} {j}"} for j in range(6)],
        }
        for i in range(3)
    ]
    for i in range(3):
        picture(root / "flickr30k" / "images" / f"{i}.png", 70 * i)
    (root / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    for split in ("train", "test"):
        folder = root / "cifar10" / split
        folder.mkdir(parents=True)
        np.save(folder / "image.npy", rng.integers(0, 256, (12, 8, 8, 3), np.uint8))
        np.save(folder / "label.npy", (np.arange(12) % 10).astype(np.int32))
    return root


def test_one_command_scores_what_is_there_and_names_what_is_not(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "WARM_UP", 1)
    monkeypatch.setattr(suite, "TIMED", 2)
    monkeypatch.setattr(suite, "probe", partial(probe, strengths=(1.0,)))
    out = tmp_path / "report.json"
    assert main(["eval", str(model), "--suite", str(data), "--beside", str(model), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    found = {(row["dataset"], row["metric"]): row for row in rows}
    assert {d for d, m in found if m == "missing"} == {
        "imagenet",
        "imagenet-r",
        "imagenet-sketch",
        "objectnet",
        "coco",
        "fashion-mnist",
        "openclipart",
    }
    assert all(row["value"] is None for row in rows if row["metric"] == "missing")
    assert {m for d, m in found if d == "cifar10"} == {"top1", "top5", "linear_probe"}
    assert found["flickr30k", "image_to_text_r1"]["n"] == 2 and found["imagenet-a", "top5"]["value"] == 100
    rates = [found["throughput", f"{what}_per_second"]["value"] for what in ("images", "texts", "pairs")]
    assert rates[2] < min(rates[:2])
    for row in rows:
        assert row["metric"] == "missing" or row["dataset"] == "throughput" or row["beside"] == row["value"]
    assert "missing" in capsys.readouterr().out


def test_published_numbers_are_of_a_named_model_and_whole_sets(model, data, monkeypatch):
    donor = open_donor(model, [family()])
    known = Published(
        "another", {"imagenet-a/top1": 7.0, "flickr30k/image_to_text_r1": 8.0, "coco/image_to_text_r1": 9.0}
    )
    monkeypatch.setattr(suite, "published_for", lambda donor: known)
    monkeypatch.setattr(suite, "_score_all", lambda *a: {key: suite.Measured(1.0, 3, classes=3) for key in (A, F)})
    A, F = ("imagenet-a", "top1"), ("flickr30k", "image_to_text_r1")

    def published():
        rows = suite.run_suite(donor, None, data)
        return {(r["dataset"], r["metric"]): r.get("published_of") and r["published"] for r in rows}

    assert published()[A] is None and published()[F] == 8.0  # three of 200 classes
    monkeypatch.setitem(suite.CLASSES_OF, "imagenet-a", 3)
    assert published()[A] == 7.0


def test_classes_of_numbered_folders_are_in_numerical_meaning(model, data):
    """Sorted as text, "10" comes before "2": label 1 is then class 10."""
    setup = setup_of(open_donor(model, [family()]), start())
    seen = []
    original = setup.tokenizer

    class Spy:
        def __call__(self, captions, context):
            seen.append(captions[0])
            return original(captions, context)

    params = load_params(open_donor(model, [family()]), setup.mesh)
    suite.SUITE["imagenet-v2"](replace(setup, tokenizer=Spy()), params, data / "imagenet-v2")
    assert seen == [TEMPLATES[0].format(CLASSES[i][1]) for i in (0, 10, 2)]


def family():
    from tinyclip_jax.zoo import FAMILY

    return FAMILY


def test_objectnet_is_over_the_classes_imagenet_has(model, tmp_path):
    root = tmp_path / "objectnet"
    for i, name in enumerate(("chair", "drill", "spoon")):
        picture(root / "images" / name / "0.png", 50 * i)
    (root / "mappings").mkdir()
    (root / "mappings" / "folder_to_objectnet_label.json").write_text(
        json.dumps({"chair": "Chair", "drill": "Drill", "spoon": "Spoon"})
    )
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(
        json.dumps({"Chair": "folding chair", "Spoon": "wooden spoon"})
    )
    donor = open_donor(model, [family()])
    setup = setup_of(donor, start())
    scored = suite.SUITE["objectnet"](setup, load_params(donor, setup.mesh), root)
    assert scored.n == 2
    framed = np.full((12, 10, 3), (255, 0, 0), np.uint8)
    framed[2:-2, 2:-2] = 7
    Image.fromarray(framed).save(root / "images" / "chair" / "0.png")
    pictures = suite.ObjectNet(FolderSource(root / "images", suite.LABELLED), [0, 2])
    assert pictures[0]["image"].shape == (8, 6, 3) and (pictures[0]["image"] == 7).all()
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text("{}")
    with pytest.raises(InputError, match="no folder is a class that the mappings share"):
        suite.SUITE["objectnet"](setup, load_params(donor, setup.mesh), root)


def parquet_of(path, picture, labels, names):
    """A parquet file of Hugging Face with class names in its schema."""
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
    table = pyarrow.table({"image": [picture] * len(labels), "label": labels})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)


def test_imagenet_of_hugging_face(model, data, tmp_path, monkeypatch, remarks):
    """It is scored on its validation split, as the test split has no labels, with the names of published numbers."""
    png = (data / "imagenet-a" / "n01440764" / "0.png").read_bytes()
    names = [f"{name}, synonym {i}" for i, (_, name) in enumerate(CLASSES)]
    (tmp_path / "imagenet" / "data").mkdir(parents=True)
    for split, labels in (("train", [0]), ("validation", [0, 2]), ("test", [-1, -1, -1])):
        parquet_of(tmp_path / "imagenet" / "data" / f"{split}-00000-of-00001.parquet", png, labels, names)
    asked = []
    monkeypatch.setattr(suite, "zeroshot_over", lambda name, source, setup, classes, templates: asked.append(
        (len(source), classes)) or (lambda params: None))  # fmt: skip
    suite.SUITE["imagenet"](None, {}, tmp_path / "imagenet")
    assert asked.pop() == (2, tuple(name for _, name in CLASSES)) and remarks() == []
    (tmp_path / "imagenet-a").mkdir()
    parquet_of(tmp_path / "imagenet-a" / "test-00000-of-00001.parquet", png, [0], ["ant", "bee, honey bee"])
    suite.SUITE["imagenet-a"](None, {}, tmp_path / "imagenet-a")
    assert asked.pop() == (1, ("ant", "bee, honey bee"))
    assert "class names are lists of synonyms ('bee, honey bee')" in remarks()[0]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train-0.tar", "test-0.tar"), "test"),
        (("x-train-00000-of-00001.parquet", "x-validation-00000-of-00001.parquet"), "validation"),
        (("0.tar",), ""),
    ],
)
def test_the_split_of_a_data_set_is_found_in_names_of_files(tmp_path, names, split):
    for name in names:
        (tmp_path / name).touch()
    assert suite._of_test(tmp_path).split == split


def test_a_folder_that_is_no_suite_is_refused(model, data, tmp_path):
    donor = open_donor(model, [family()])
    with pytest.raises(InputError, match="holds no data set of the suite"):
        suite.run_suite(donor, None, tmp_path)
    (tmp_path / "cifar100").mkdir()
    with pytest.raises(InputError, match="cifar100: no data set of the suite has this name"):
        suite.run_suite(donor, None, tmp_path)
    for change, message in (
        ({"images": [{"split": "test"}]}, "not a file of Karpathy's splits: 'sentences' is missing"),
        ({"images": [{"split": "test", "filename": "0.png", "sentences": []}]}, r"0\.png: its caption is \[\]"),
        ({}, "'images' is missing"),
    ):
        file = tmp_path / "karpathy" / "coco" / "dataset_coco.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(change))
        with pytest.raises(InputError, match=message):
            suite.run_suite(donor, None, tmp_path / "karpathy")
    picture(tmp_path / "wrong" / "imagenet" / "tench" / "0.png", 0)
    with pytest.raises(InputError, match="the folder 'tench' is no class of ImageNet"):
        suite.run_suite(donor, None, tmp_path / "wrong")


def test_data_sets_in_other_forms_score_the_same(model, data, tmp_path):
    """flickr30k as one table, imagenet-a as CLIP_benchmark's shards, cifar10 as parquet with splits in file names."""
    donor = open_donor(model, [family()])
    setup = setup_of(donor, start())
    params = load_params(donor, setup.mesh)

    def scored(name, folder):
        found = suite.SUITE[name](setup, params, folder / name)
        return found.metrics, found.n, found.classes

    flickr = tmp_path / "flickr30k"
    shutil.copytree(data / "flickr30k" / "images", flickr)
    rows = [f"{i}.png,no {i} {j}" for i in (1, 2) for j in range(5)]
    (flickr / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    assert scored("flickr30k", tmp_path) == scored("flickr30k", data)

    shards, names = tmp_path / "imagenet-a" / "test", dict(CLASSES)
    shards.mkdir(parents=True)
    folders = sorted(path for path in (data / "imagenet-a").iterdir())
    with tarfile.open(shards / "0.tar", "w") as tar:
        for i, folder in enumerate(folders):
            for extension, content in (("png", (folder / "0.png").read_bytes()), ("cls", str(i).encode())):
                info = tarfile.TarInfo(f"s{i}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(
        InputError, match=r"does not name the 200 classes of its labels: put classnames\.txt next to the shards"
    ):
        scored("imagenet-a", tmp_path)
    (shards.parent / "classnames.txt").write_text("".join(f"{names[folder.name]}\n" for folder in folders))
    assert scored("imagenet-a", tmp_path) == scored("imagenet-a", data) and scored("imagenet-a", data)[2] == 3

    (tmp_path / "cifar10").mkdir()
    for split in ("train", "test"):
        pixels, labels = (np.load(data / "cifar10" / split / f"{name}.npy") for name in ("image", "label"))
        cells = []
        for array in pixels:
            out = io.BytesIO()
            Image.fromarray(array).save(out, "PNG")
            cells.append(out.getvalue())
        table = pyarrow.table({"image": cells, "label": [suite.CIFAR10[i] for i in labels]})
        parquet.write_table(table, tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "probe", partial(probe, strengths=(1.0,)))
        assert scored("cifar10", tmp_path) == scored("cifar10", data)

"""Retrieval and zero-shot on data in every form, and what is wrong with data, names or weights in one line."""

import io
import json
import re
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import tinyclip_jax
from heirloom.common.cli import main
from heirloom.common.data.class_names import as_words
from heirloom.common.data.imagenet import CLASSES
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from tinyclip_jax.evaluate import Words
from tinyclip_jax.model import Clip
from tinyclip_jax.pretrained import Pretrained


@pytest.fixture(scope="module")
def weights(cfg, draw, tmp_path_factory):
    """A small CLIP with a tokenizer, as a folder."""
    tokenizer = Tokenizer.train(["a photo of a cat", "a photo of a dog"], 520)
    cfg = replace(cfg, text=replace(cfg.text, vocab=tokenizer.vocab_size))
    model, folder = functional(Clip, cfg), tmp_path_factory.mktemp("weights") / "small"
    Pretrained(cfg, model, draw(model.spec), Preprocess(cfg.image.size), tokenizer).save(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One picture each of three classes."""
    folder, out = tmp_path_factory.mktemp("pictures"), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(out, "PNG")
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir()
        (folder / name / "one.png").write_bytes(out.getvalue())
    return folder


def zeroshot(weights, data, *options):
    return main(["eval", str(weights), "--task", "zeroshot", "--data", str(data), *map(str, options)])


def test_too_few_class_names_are_refused_in_one_line(weights, pictures, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n\n")
    assert zeroshot(weights, pictures, "--classes", names) == 2
    said = (
        f"heirloom: {pictures}: its class 'cat' does not match exactly one of the 2 known (ant, bee); did you mean"
        " 'ant'?\n"
    )
    assert capsys.readouterr().err == said
    names.write_text("ant\nbee\ncat\n")
    assert zeroshot(weights, pictures, "--classes", names) == 0


def test_names_and_labels_that_are_not_there_are_refused_in_one_line(weights, pictures, tmp_path, capsys):
    assert zeroshot(weights, pictures, "--classes", tmp_path / "names.txt") == 2
    assert capsys.readouterr().err == f"heirloom: {tmp_path / 'names.txt'}: no such file\n"
    assert zeroshot(weights, pictures / "ant") == 2
    said = capsys.readouterr().err
    assert "ant has no column 'label'" in said and said.count("\n") == 1
    shutil.copytree(pictures / "ant", tmp_path / "alone" / "ant")
    assert zeroshot(weights, tmp_path / "alone") == 2
    said = capsys.readouterr().err
    assert "alone has one class, 'ant', which is always right" in said and said.count("\n") == 1


def test_identifiers_make_no_prompts(weights, pictures, tmp_path, capsys):
    for name, other in (("ant", "n01440764"), ("bee", "n01443537")):
        shutil.copytree(pictures / name, tmp_path / other)
    assert zeroshot(weights, tmp_path) == 2
    said = capsys.readouterr().err
    assert "class names are WordNet ids (n01440764 ...), which cannot be used in prompts: give --classes" in said


def test_names_of_folders_become_words_of_prompts(weights, pictures, tmp_path, capsys):
    folders = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    for source, folder in zip(("ant", "bee"), folders, strict=True):
        shutil.copytree(pictures / source, tmp_path / "cub" / folder)
    assert zeroshot(weights, tmp_path / "cub") == 0
    said = "the prompt of class '001.Black_footed_Albatross' is 'a photo of a Black footed Albatross.'"
    assert said in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("black_foot\nlaysan_x\n")  # a given list is used as it is
    assert zeroshot(weights, tmp_path / "cub", "--classes", tmp_path / "names.txt") == 0
    assert "the prompt of" not in capsys.readouterr().out


def test_names_for_prompts_lose_what_numbers_them():
    assert as_words(("n02085620-Chihuahua", "n02085782-Japanese_spaniel")) == ("Chihuahua", "Japanese spaniel")
    assert as_words(("golden_retriever", "7_up", "t-shirt")) == ("golden retriever", "7 up", "t-shirt")
    assert as_words(("2-door car", "4-door car")) == ("2-door car", "4-door car")  # they differ by the number
    assert as_words(("1", "2")) == ("1", "2")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("AnnualCrop", "Forest", "SeaLake"), ("Annual Crop", "Forest", "Sea Lake")),  # EuroSAT
        (("golden-retriever", "pug", "T-shirt"), ("golden retriever", "pug", "T-shirt")),
        (("black-and-tan_coonhound", "YouTube"), ("black-and-tan coonhound", "YouTube")),
        (("a/abbey", "b/bow_window/indoor"), ("abbey", "bow window indoor")),  # SUN397
        (("a/abbey", "b/indoor"), ("a abbey", "b indoor")),
        (("BMW", "iMac"), ("BMW", "i Mac")),
    ],
)
def test_names_without_spaces_become_words(names, words):
    assert as_words(names) == words


def test_a_prompt_is_shown_whatever_the_names(weights, pictures, tmp_path, capsys):
    assert zeroshot(weights, pictures) == 0
    assert "note: " in (said := capsys.readouterr().out) and said.count("the prompt of class") == 1
    assert "the prompt of class 'ant' is 'a photo of a ant.'; --classes FILE takes other names" in said
    for old, new in (("bee", "bee, honey bee"), ("cat", "cat")):
        shutil.copytree(pictures / old, tmp_path / "listed" / new)
    assert zeroshot(weights, tmp_path / "listed") == 0
    said = capsys.readouterr().out
    assert "is 'a photo of a bee, honey bee.'; --classes FILE takes one of the synonyms, and so does --classes" in said


def test_what_has_no_effect_is_refused(weights, pictures, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    names = ["--classes", str(tmp_path / "names.txt")]
    assert main(["eval", str(weights), "--data", str(pictures), *names]) == 2
    assert "classes has no effect on retrieval: set task to zeroshot" in capsys.readouterr().err
    assert main(["eval", str(weights), "--suite", str(tmp_path), *names]) == 2
    assert "data sets of a suite have their own settings, and --classes is for one data set" in capsys.readouterr().err
    assert zeroshot(weights, pictures, "--text", "txt") == 2
    assert "text has no effect on zeroshot: set task to retrieval, or leave it out" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"classes is the text 'names\.txt': give a list of strings"):
        Words.of("names.txt", None)


def test_the_column_of_the_class_is_named(weights, tmp_path, capsys):
    columns = {"image": [picture(i) for i in range(4)], "fine_label": ["ant", "bee", "ant", "cat"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert zeroshot(weights, tmp_path / "a.parquet") == 2
    assert "has no column 'label'; did you mean 'fine_label'?" in capsys.readouterr().err
    assert zeroshot(weights, tmp_path / "a.parquet", "--label", "fine_label", "--classes", names_of(tmp_path)) == 0


def names_of(folder):
    (folder / "names.txt").write_text("ant\nbee\ncat\n")
    return folder / "names.txt"


def test_two_classes_of_one_name_are_said(weights, tmp_path, capsys):
    data = shard(tmp_path / "0.tar", [("0.png", picture(0)), ("0.cls", b"0")])
    (tmp_path / "names.txt").write_text("cat\ndog\ncat\n")
    assert zeroshot(weights, data, "--classes", tmp_path / "names.txt") == 0
    said = capsys.readouterr().out
    assert "note: several of the 3 classes are called 'cat': their pictures are never in the top 1" in said


def test_a_folder_of_pictures_without_captions(weights, tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    assert main(["eval", str(weights), "--data", str(tmp_path)]) == 2
    assert "put a .txt next to each picture, or give a .csv (metadata.csv --image file_name" in capsys.readouterr().err
    columns = ("--image", "file_name", "--text", "text")
    assert main(["eval", str(weights), "--data", str(tmp_path / "metadata.csv"), *columns]) == 0


def picture(value, form="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (20, 24, 3), np.uint8)).save(out, form)
    return out.getvalue()


def scored(weights, tmp_path, *options):
    """Metric -> value in percent, and n, of `heirloom eval`."""
    out = tmp_path / "scores.json"
    assert main(["eval", str(weights), *map(str, options), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    return {row["metric"]: row["value"] for row in rows}, rows[0]["n"]


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# Short enough for a context of ten tokens. Picture 2 has one caption twice.
CAPTIONS = [[f"{i} is {j if (i, j) != (2, 4) else 3}" for j in range(3 + i % 3)] for i in range(12)]


def recall(image, text, owner):
    """Any caption of a picture counts; a caption that a picture has twice is asked for twice (CLIP_benchmark)."""
    right = np.asarray(owner) == np.arange(len(image))[:, None]
    found = {}
    for name, similarity, positive in (
        ("image_to_text", image @ text.T, right),
        ("text_to_image", text @ image.T, right.T),
    ):
        order = np.argsort(-similarity, axis=1)
        found |= {f"{name}_r{k}": 100 * np.take_along_axis(positive, order[:, :k], 1).any(1).mean() for k in (1, 5, 10)}
    return found


@pytest.mark.parametrize("form", ["csv", "parquet bytes", "parquet paths", "webdataset"])
def test_several_captions_of_a_picture_in_every_form(weights, tmp_path, form):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    rows = [(i, text) for i, texts in enumerate(CAPTIONS) for text in texts]
    if form == "csv":
        data = tmp_path / "a.csv"
        data.write_text("image,caption\n" + "".join(f"{i}.png,{text}\n" for i, text in rows))
    elif form == "webdataset":
        members = (
            (f"s{i}.{e}", d)
            for i, c in enumerate(CAPTIONS)
            for e, d in (("png", picture(i)), ("txt", "\n".join(c).encode()))
        )
        data = shard(tmp_path / "0.tar", members)
    else:
        data = tmp_path / "a.parquet"
        cells = [picture(i) if form == "parquet bytes" else f"{i}.png" for i, _ in rows]
        parquet.write_table(
            pyarrow.table({"image": cells, "caption": [text for _, text in rows]}), data, row_group_size=7
        )
    clip = tinyclip_jax.load(str(weights))
    want = recall(
        np.asarray(clip.encode_image([picture(i) for i in range(12)])),
        np.asarray(clip.encode_text([text for _, text in rows])),
        [i for i, _ in rows],
    )
    got, n = scored(weights, tmp_path, "--data", data)
    assert n == 12 and {name: got[name] for name in want} == pytest.approx(want)


def test_captions_of_several_pictures_are_said(weights, tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    data = tmp_path / "a.csv"
    data.write_text("image,caption\n0.png,0 is 0\n1.png,0 is 0\n2.png,2 is 2\n")
    scored(weights, tmp_path, "--data", data)
    said = "only the picture's own copy counts as correct, and a tie as wrong"
    assert f"note: {data}: 2 of 3 captions occur with several pictures: {said}" in "".join(capsys.readouterr())


def test_zeroshot_on_clip_benchmarks_shards(weights, tmp_path, capsys):
    """No caption; names and templates from files next to the splits, or from flags, in any order."""
    (tmp_path / "test").mkdir()
    members = [
        (f"s{i:07d}.{e}", d) for i in range(6) for e, d in (("webp", picture(i, "WEBP")), ("cls", str(i % 3).encode()))
    ]
    shard(tmp_path / "test" / "0.tar", members)
    assert zeroshot(weights, tmp_path, "--split", "test") == 2
    assert "names no classes: give --classes" in capsys.readouterr().err
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncat\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}\n")
    want, n = scored(weights, tmp_path, "--task", "zeroshot", "--data", tmp_path, "--split", "test")
    assert n == 6 and "templates from" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("cat\nant\nbee\n")
    (tmp_path / "templates.txt").write_text("a drawing of a {}\n")
    options = ("--classes", tmp_path / "names.txt", "--templates", tmp_path / "templates.txt")
    assert scored(weights, tmp_path, "--task", "zeroshot", "--data", tmp_path, "--split", "test", *options)[0] == want


def test_labels_by_name_or_number_score_the_same(weights, tmp_path, capsys):
    names, labels = tmp_path / "names.txt", [0, 1, 2, 1, 1, 2]
    names.write_text("dog\ncat\nbee\n")

    def top1(values):
        parquet.write_table(
            pyarrow.table({"image": [picture(i) for i in range(6)], "label": values}), tmp_path / "a.parquet"
        )
        return scored(weights, tmp_path, "--task", "zeroshot", "--data", tmp_path / "a.parquet", "--classes", names)[0][
            "top1"
        ]

    assert top1(labels) == top1([("dog", "cat", "bee")[i] for i in labels])
    unknown, far = (
        (["dog"] * 5 + ["dgo"], "'dgo' does not match"),
        ([0] * 5 + [3], "row 5: its label is 3, the classes are 0 to 2"),
    )
    for values, message in (unknown, far):
        parquet.write_table(
            pyarrow.table({"image": [picture(i) for i in range(6)], "label": values}), tmp_path / "a.parquet"
        )
        assert zeroshot(weights, tmp_path / "a.parquet", "--classes", names) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_folders_by_wordnet_identifier_find_their_class(weights, pictures, tmp_path):
    """With the 1,000 names of ImageNet, three folders are those three classes, not the first three."""
    folder = tmp_path / "d"
    for identifier in ("n01440764", "n15075141", "n02106662"):
        shutil.copytree(pictures / "ant", folder / identifier)
    data = open_labelled(SourceConfig(str(folder)), "label", 1000, Words.of("imagenet", None).synonyms)
    assert [int(data[i]["label"]) for i in range(3)] == [0, 235, 999]


def test_classes_of_imagenet_at_the_hub_are_taken_in_their_order(pictures, tmp_path):
    """The class label of its parquet has WordNet's synonyms, of which some name two classes."""
    names = [name for _, name in CLASSES]
    names[264] = "Cardigan, Cardigan Welsh corgi"
    cells = pyarrow.table({"image": [(pictures / "ant" / "one.png").read_bytes()] * 2, "label": [264, 474]})
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
    parquet.write_table(cells.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / "a.parquet")
    cfg = SourceConfig(str(tmp_path / "a.parquet"), text="")
    data = open_labelled(cfg, "label", 1000, Words.of("imagenet", None).synonyms)
    assert [int(data[i]["label"]) for i in range(2)] == [264, 474]


def test_weights_of_nan_have_no_score(weights, pictures, tmp_path, capsys):
    donor = tinyclip_jax.load(str(weights))
    params = {
        path: np.full_like(value, np.nan) if path.endswith("norm/scale") else value
        for path, value in donor.params.items()
    }
    replace(donor, params=params).save(tmp_path / "nan")
    for options in (("--data", "emoji:noto"), ("--task", "zeroshot", "--data", str(pictures))):
        assert main(["eval", str(tmp_path / "nan"), *options]) == 2
        said = capsys.readouterr().err
        assert said.startswith("heirloom: the features of this model: NaN or infinite for ") and said.count("\n") == 1


@pytest.mark.parametrize("text", ["a photo of a cat", "a photo of a %s", "a {} of {}"])
def test_a_template_without_one_place_for_the_name_is_refused(text, tmp_path):
    (tmp_path / "t.txt").write_text(f"a drawing of a {{c}}\n{text}\n")
    with pytest.raises(InputError, match=rf"t\.txt, line 2: '{re.escape(text)}' needs one \{{\}}"):
        Words.read(None, tmp_path / "t.txt")
    with pytest.raises(InputError, match=r"template 1: .* needs one \{\}"):
        Words.of(None, [text])
    (tmp_path / "t.txt").write_text("a drawing of a {c}\n")
    assert Words.read(None, tmp_path / "t.txt").templates == ("a drawing of a {}",)

"""The demo and the notebook's verbs, on the embedded teacher, in few steps."""

import io
import json
import os
import re
import tempfile
from dataclasses import replace
from operator import ge, le

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import tinyclip_jax
from heirloom.common import config
from heirloom.common.cli import main
from heirloom.common.data import emoji
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.demo import Race
from heirloom.common.errors import InputError
from tinyclip_jax.zoo import EMBEDDED

pytestmark = pytest.mark.usefixtures("one_device")

TEACHER = 6_315_457
STUDENT = 3_406_977


@pytest.fixture(scope="module")
def teacher(one_device):
    return tinyclip_jax.load("embedded:emoji")


def test_the_demo_races_draws_and_reports(tmp_path, monkeypatch, capsys):
    recipe, pairs = config.load("tinyclip/emoji"), tmp_path / "pairs.parquet"
    parquet.write_table(parquet.read_table(emoji.path("noto"), filters=[("split", "=", "test")]).slice(0, 100), pairs)
    short = replace(
        recipe,
        steps=1,
        eval_every=1,
        log_every=1,
        held_out=SourceConfig(str(pairs), columns=("concept",)),
        pipeline=replace(recipe.pipeline, batch=16),
        optim=replace(recipe.optim, warmup=1),
    )
    monkeypatch.setattr(config, "load", lambda name, flags=(): short)
    if os.access("/dev/shm", os.W_OK):  # temporary files on another file system, as on many machines
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert main(["demo", "--seed", "3", "--out", str(tmp_path), "--json", str(tmp_path / "demo.json")]) == 0
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["parameters"] == {"teacher": TEACHER, "student": STUDENT}
    # Even untrained, the inherited student knows more than chance (1 %); scratch does not.
    curves = {name: curve["r1"] for name, curve in found["curves"].items()}
    assert found["scores"]["teacher"]["r1"] > 0.1 > curves["inherited"][0] > 0.02 > curves["scratch"][0]
    assert [len(curves[name]) for name in ("inherited", "scratch")] == [2, 2]
    assert found["steps"] == 1 and found["steps_to_scratch"] == 0 and found["seconds"] > 0
    picture = np.asarray(Image.open(found["picture"]).convert("L"))
    assert picture.shape[1] > 1000 and picture.std() > 10
    assert tinyclip_jax.load(str(tmp_path / "student")).cfg == recipe.student
    said = capsys.readouterr().out
    assert re.search(r"^teacher +6,315,457 ", said, re.MULTILINE) and "picture:" in said
    r1 = [f"{100 * found['scores'][name]['r1']:.1f} %" for name in ("inherited", "scratch", "teacher")]
    assert f"held-out R@1: {r1[0]} with inheritance, {r1[1]} from scratch, {r1[2]} for the teacher\n" in said
    assert said.endswith("other demos: heirloom demo learngene, heirloom demo lit, heirloom demo weightgen\n")


def test_the_teacher_is_small_enough_to_clone():
    files = list(EMBEDDED["emoji"].iterdir())
    assert {file.name for file in files} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocess.json",
        "tokenizer.json",
    }
    assert sum(file.stat().st_size for file in files) <= 14e6


def test_steps_to_reach():
    race = Race([0, 10, 20], [0.1, 0.3, 0.5], {}, None)
    assert [race.reaches(score, ge) for score in (0.05, 0.3, 0.31, 0.6)] == [0, 10, 20, None]
    assert [race.reaches(score, le) for score in (0.05, 0.1, 0.6)] == [None, 0, 0]


def test_a_notebook_finds_the_apple(teacher, tmp_path):
    data = open_source(SourceConfig("emoji", split="train"))
    pictures = {record["text"]: record["image"] for record in (data[i] for i in range(len(data)))}
    names = ["rocket", "pizza", "key", "frog", "guitar"]
    Image.open(io.BytesIO(pictures["pizza"])).save(tmp_path / "pizza.png")
    images = [pictures[name] for name in names]
    images[1] = tmp_path / "pizza.png"
    similarity = np.asarray(teacher.encode_image(images) @ teacher.encode_text(names).T)
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(np.linalg.norm(teacher.encode_image(images[0])), 1, rtol=1e-5)


def test_inherit_from_saves_and_loads_again(teacher, tmp_path):
    cfg = config.load("tinyclip/emoji").student
    student = tinyclip_jax.inherit_from(teacher, cfg)
    assert sum(v.size for v in student.params.values()) == STUDENT
    np.testing.assert_array_equal(student.params["image/cls"], teacher.params["image/cls"][:128])
    student.save(tmp_path / "student")
    again = tinyclip_jax.load(str(tmp_path / "student"))
    np.testing.assert_array_equal(again.encode_text("a cat"), student.encode_text("a cat"))
    with pytest.raises(InputError, match="exists"):
        student.save(tmp_path / "student")


def test_inherit_writes_where_everything_came_from(tmp_path):
    assert main(["inherit", "tinyclip/emoji", str(tmp_path / "student"), "--json", str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "student" / "provenance.json").read_text())
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert record["fraction"] == pytest.approx(1 - 1 / STUDENT, abs=1e-6) and record["source"] == "embedded:emoji"
    assert len(record["hashes"]["model.safetensors"]) == 64
    line = record["parameters"]["text/blocks/mlp/up/kernel"]
    assert line["maps"].startswith("layer: rows 0 2") and line["fraction"] == 1
    assert record["parameters"]["logit_scale"]["maps"] == "fresh"
    assert main(["inspect", str(tmp_path / "student"), "--json", str(tmp_path / "i.json")]) == 0
    assert json.loads((tmp_path / "i.json").read_text())["parameters"]["total"] == STUDENT


def test_eval_prints_rows_and_writes_them(tmp_path, capsys):
    assert main(["eval", "embedded:emoji", "--json", str(tmp_path / "e.json")]) == 0
    rows = {row["metric"]: row for row in json.loads((tmp_path / "e.json").read_text())["rows"]}
    assert (
        rows["r1"]["value"] == pytest.approx(7.67, abs=0.3)
        and rows["r1"]["n"] == 900
        and rows["r1"]["dataset"] == "emoji/test"
    )
    assert "image_to_text_r1" in capsys.readouterr().out


def test_zero_shot_over_a_folder_of_classes(tmp_path, capsys):
    data = open_source(SourceConfig("emoji:noto", split="train"))
    names = ("pizza", "rocket", "guitar", "banana", "key", "bell")
    for record in (data[i] for i in range(len(data))):
        if record["text"] in names:
            folder = tmp_path / "pictures" / record["text"]
            folder.mkdir(parents=True)
            (folder / "one.webp").write_bytes(record["image"])
    (tmp_path / "templates.txt").write_text("{}\n")
    argv = [
        "eval",
        "embedded:emoji",
        "--task",
        "zeroshot",
        "--data",
        str(tmp_path / "pictures"),
        "--templates",
        str(tmp_path / "templates.txt"),
    ]
    assert main([*argv, "--json", str(tmp_path / "e.json")]) == 0
    rows = {row["metric"]: row for row in json.loads((tmp_path / "e.json").read_text())["rows"]}
    assert rows["top1"]["value"] >= 100 * 4 / 6 and rows["top5"]["value"] == 100 and rows["top1"]["n"] == 6

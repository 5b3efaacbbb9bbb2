"""Zero-shot over labelled pictures, asked for wrongly: one line that says what is missing."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.cli import main
from common.data.preprocess import Preprocess
from common.data.text import Tokenizer
from common.nn.functional import functional
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
    said = "heirloom: the data has a label 2 and there are 2 class names: give one for every label, in order\n"
    assert capsys.readouterr().err == said
    names.write_text("ant\nbee\ncat\n")
    assert zeroshot(weights, pictures, "--classes", names) == 0


def test_names_and_labels_that_are_not_there_are_refused_in_one_line(weights, pictures, tmp_path, capsys):
    assert zeroshot(weights, pictures, "--classes", tmp_path / "names.txt") == 2
    assert capsys.readouterr().err == f"heirloom: {tmp_path / 'names.txt'}: no such file\n"
    assert zeroshot(weights, pictures / "ant") == 2
    said = capsys.readouterr().err
    assert "ant has no column 'label'" in said and said.count("\n") == 1

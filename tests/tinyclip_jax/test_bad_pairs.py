"""A run on pairs of which some are bad: it goes on, counts and lists them, and stops where it is asked to."""

import json

import numpy as np
import pytest
from PIL import Image

from heirloom.common.cli import main
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError
from tinyclip_jax.inputs import captions

FLAGS = "--steps 4 --log-every 2 --save-every 2 --pipeline.batch 16 --optim.warmup 1 --held-out.path= --data.split="
SMALL = "--student.text.vocab 540 --student.image.layers 1 --student.text.layers 1"


@pytest.fixture
def pairs(tmp_path):
    """32 pairs: the first picture does not decode, the caption of the second is not text."""
    folder, rng = tmp_path / "pairs", np.random.default_rng(0)
    folder.mkdir()
    for i in range(32):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"caption {i}")
    (folder / "00.png").write_bytes(b"?")
    (folder / "01.txt").write_bytes(b"\xff")
    return folder


def test_a_run_goes_on(pairs, one_device, tmp_path, capsys):
    run, command = tmp_path / "run", ["train", "tinyclip/smoke", *FLAGS.split(), *SMALL.split()]
    command += ["--data.path", str(pairs), "--run", str(run)]
    assert main([*command, "--pipeline.bad", "stop"]) == 2
    assert f"heirloom: {pairs}/01.txt is not UTF-8 text" in capsys.readouterr().err
    assert main(command) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["bad"]) for line in lines] == [(2, 2), (4, 2)]  # two epochs
    assert "bad 2  " in capsys.readouterr().out
    listed = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in listed} == {f"{pairs}/00.png", f"{pairs}/01.png"} and len(listed) == 2


def test_a_tokenizer_is_fitted_to_the_captions_that_are_text(pairs):
    source = open_source(SourceConfig(str(pairs)))
    assert len(captions(source, "replace")) == 31 and "caption 1" not in captions(source, "replace")
    with pytest.raises(InputError, match=r"01\.txt is not UTF-8 text"):
        captions(source)

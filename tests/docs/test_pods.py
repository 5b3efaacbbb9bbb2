"""The rehearsal of the guide to pods, against a bucket: fsspec's memory, and a server of GCS where it is installed."""

import io
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heirloom.common.cli import main
from heirloom.common.files import read_json
from heirloom.common.paths import Address, place
from tests.common.buckets.conftest import cache, gs  # noqa: F401

GUIDE = Path(__file__).parents[2] / "docs" / "pods.md"
FASTER = ["--steps", "4", "--save-every", "2", "--optim.warmup", "1"]


def commands():
    section = GUIDE.read_text().split("## Rehearse")[1].split("```")[1]
    return [shlex.split(line) for line in section.splitlines() if line.startswith("heirloom ")]


def shard(first, count):
    rng, out = np.random.default_rng(first), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(first, first + count):
            colour, picture = [int(c) for c in rng.integers(0, 256, 3)], io.BytesIO()
            Image.new("RGB", (40, 40), tuple(colour)).save(picture, "JPEG")
            for extension, data in (("jpg", picture.getvalue()), ("txt", f"a picture of {colour[0] // 64}".encode())):
                info = tarfile.TarInfo(f"{i:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("scheme", ["memory", "gs"])
def test_the_rehearsal(scheme, request, tmp_path, monkeypatch, capsys):
    if scheme == "gs":
        request.getfixturevalue("gs")
    bucket = place(f"{scheme}://pod/guide")
    assert isinstance(bucket, Address)
    for i in range(2):
        bucket.child(f"yfcc/{i:05d}.tar").write_bytes(shard(48 * i, 48))
    monkeypatch.chdir(tmp_path)
    words = [[word.replace("gs://my-bucket", str(bucket)) for word in command[1:]] for command in commands()]
    assert [command[0] for command in words] == ["train", "eval", "report", "convert"]
    words[0] += FASTER
    for command in words:
        assert main(command) == 0, (command, capsys.readouterr().err)
    out = capsys.readouterr().out
    assert 'first caption: "a picture of ' in out and f"the run is in {bucket}/rehearsal" in out
    assert {"report.html", "metrics.jsonl", "model/model.safetensors"} <= set(bucket.child("rehearsal").files())
    assert read_json(tmp_path / "rehearsal" / "config.json")["model_type"] == "clip"

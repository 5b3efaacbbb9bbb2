"""What users hand in by mistake: one line that names file, tensor and way out, and never a half-written folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.errors import InputError
from heirloom.common.surgery.layout import Tensor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hf(goldens, tmp_path):
    """A Hugging Face folder to spoil."""
    return Path(shutil.copytree(goldens / "hf_quick_gelu", tmp_path / "hf"))


def rewrite(folder, change, name="model.safetensors"):
    tensors = {key: np.array(value) for key, value in open_safetensors(folder / name).items()}
    change(tensors)
    with create_safetensors(
        folder / name, {key: Tensor(value.shape, value.dtype) for key, value in tensors.items()}
    ) as out:
        for key, value in tensors.items():
            out[key][...] = value


def reconfigure(folder, part, **fields):
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, families, message):
    with pytest.raises(InputError, match=message) as error:
        open_donor(folder, families)
    assert "\n" not in str(error.value)


KEY = "text_model.encoder.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), rf"hf/model\.safetensors: tensor '{KEY}' is missing"),
        (
            lambda t: t.update(logit_scales=t.pop("logit_scale")),
            "tensor 'logit_scale' is missing; did you mean 'logit_scales'",
        ),
        (
            lambda t: t.update({KEY + "s": t[KEY]}),
            f"tensor '{KEY}s' is not part of this hf model; did you mean '{KEY}'",
        ),
        (
            lambda t: t.update({KEY: t[KEY][:8]}),
            rf"tensor '{KEY}' has shape \(8, 16\), this configuration needs \(16, 16\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, hf, families):
    rewrite(hf, change)
    refused(hf, families, message)


@pytest.mark.parametrize("keep", [0, 5, 200, 100_000])
def test_truncated_weights(keep, hf, families):
    content = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(content[:keep])
    refused(hf, families, r"model\.safetensors: cut short, or not a safetensors file .*; fetch it again$")


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (
            "text_config",
            dict(hidden_act="relu"),
            r"config\.json: text_config: hidden_act is 'relu'; only 'gelu_python', 'gelu', ",
        ),
        ("vision_config", dict(num_hidden_layers=4), r"tensor 'vision_model\.encoder\.layers\.3\..*' is missing"),
        ("vision_config", dict(patch_size=16), r"tensor 'vision_model\.embeddings\..*' has shape"),
        ("vision_config", dict(num_attention_heads=5), "5 heads do not divide a width of 32"),
        (
            "text_config",
            dict(vocab_size=63),
            r"token_embedding\.weight' has shape \(64, 16\), this configuration needs \(63, 16\)",
        ),
        (None, dict(projection_dim=16), r"projection\.weight' has shape"),
    ],
)
def test_a_config_of_another_model(part, fields, message, hf, families):
    reconfigure(hf, part, **fields)
    refused(hf, families, message)


def test_weights_without_their_config(hf, families):
    (hf / "config.json").unlink()
    refused(hf, families, r"a Hugging Face CLIP needs its config\.json next to the weights")


def test_a_config_that_does_not_parse(hf, families):
    (hf / "config.json").write_text('{"text_config": ')
    refused(hf, families, r"config\.json: cannot be read as JSON")


def test_two_weights_files_in_a_folder(hf, families):
    shutil.copy(hf / "model.safetensors", hf / "model.fp16.safetensors")
    refused(
        hf,
        families,
        r"hf holds model\.fp16\.safetensors and model\.safetensors, both tinyclip models; name the file you mean",
    )
    assert open_donor(hf / "model.safetensors", families).file == hf / "model.safetensors"


def test_a_folder_without_weights(hf, families):
    (hf / "model.safetensors").unlink()
    refused(hf, families, r"its tensors \(images, tokens, .*\) match no known model")  # expected.npz
    (hf / "expected.npz").unlink()
    refused(hf, families, r"hf holds no weights \(no \.safetensors, \.bin, \.pt, .*, \.msgpack, \.npz\)")


def test_tensors_of_no_known_model(tmp_path, families):
    with create_safetensors(
        tmp_path / "x.safetensors", {"bert.pooler.weight": Tensor((2,), np.dtype("float32"))}
    ) as out:
        out["bert.pooler.weight"][...] = 0
    known = r"known are tinyclip \(hf, flax, open_clip, original\)"
    refused(tmp_path, families, rf"its tensors \(bert\.pooler\.weight.*\) match no known model; {known}")


def test_half_a_clip(goldens, tmp_path, families):
    folder = Path(shutil.copytree(goldens / "open_clip_f16", tmp_path / "half"))
    rewrite(folder, lambda t: t.pop("visual.proj"), "open_clip_model.safetensors")
    refused(folder, families, r"tensor 'visual\.proj' is missing: this is not a whole CLIP with ViT and text towers")


@pytest.fixture
def ours(hf, families, tmp_path):
    convert(open_donor(hf, families), tmp_path / "ours", "heirloom", verify=False)
    return tmp_path / "ours"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"visual.transformer.resblocks.foo": t["visual.proj"]}),
        lambda t: t.update({"visual.conv1.weight": t["visual.conv1.weight"][0]}),
        lambda t: t.update({"text_projection": t["text_projection"][0]}),
    ],
)
def test_tensors_of_no_clip_under_its_names(change, goldens, tmp_path, families):
    folder = Path(shutil.copytree(goldens / "open_clip_f16", tmp_path / "open"))
    rewrite(folder, change, "open_clip_model.safetensors")
    refused(folder, families, "its tensors are not those of a CLIP with ViT and text towers")


def test_a_folder_of_ours_that_was_spoilt(ours, families):
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"method": "other"}))
    refused(ours, families, r"made by the method 'other', which is not installed \(here: tinyclip\)")
    (ours / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"colour": 3}}))
    refused(ours, families, r"config\.json: there is no field 'colour'; was it written by another version")
    (ours / "config.json").write_text(json.dumps({"format": "heirloom"}))
    refused(ours, families, r"config\.json: 'method' is missing; convert the checkpoint again")
    (ours / "config.json").write_text(json.dumps(config))
    rewrite(ours, lambda t: t.pop("image/cls"))
    refused(ours, families, "tensor 'image/cls' is missing")


def test_a_folder_of_ours_is_not_converted_to_itself(ours, families, tmp_path):
    with pytest.raises(InputError, match="the source is in the heirloom format already"):
        convert(open_donor(ours, families), tmp_path / "out", "heirloom")
    assert not (tmp_path / "out").exists()


def test_an_existing_destination_is_kept_unless_forced(hf, families, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    donor = open_donor(hf, families)
    with pytest.raises(InputError, match="out exists; give another name, or --force to replace it"):
        convert(donor, out, "heirloom", verify=False)
    assert [p.name for p in out.iterdir()] == ["precious"]
    convert(donor, out, "heirloom", verify=False, force=True)
    assert not (out / "precious").exists() and (out / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_a_checkpoint_may_be_replaced_by_its_own_conversion(hf, families):
    """The old file stays mapped while the new one is written."""
    before = {path: np.array(view) for path, view in open_donor(hf, families).source.values.items()}
    convert(open_donor(hf, families), hf, "heirloom", verify=False, force=True)
    after = open_donor(hf, families)
    assert after.format == "heirloom"
    for path, value in before.items():
        np.testing.assert_array_equal(np.asarray(after.source.values[path]), value)


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.errors import InputError
from tinyclip_jax.zoo import FAMILY

source, destination, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
donor = open_donor(source, [FAMILY])
if what == "fill":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the weights are 196,732 bytes
else:
    weights.write_config = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
try:
    convert(donor, destination, "heirloom", verify=False)
except InputError as error:
    print(error)
    sys.exit(2)
"""


def program(source, destination, what):
    """Convert in a process of its own, whose disk fills up or which is killed after the tensors are written."""
    command = [sys.executable, "-c", PROGRAM, source, destination, what]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )


def test_a_full_disk_leaves_nothing_and_says_so_in_a_line(hf, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = program(hf, out / "student", "fill")
    assert done.returncode == 2, done.stderr
    assert (
        done.stdout
        == f"{out / 'student'}: could not be written (File too large); free some space or choose another place\n"
    )
    assert list(out.iterdir()) == []


def test_a_kill_while_writing_leaves_nothing_under_the_name(hf, families, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = program(hf, out / "student", "kill")
    assert done.returncode == -signal.SIGKILL
    (left,) = out.iterdir()
    assert left.name.startswith(".student.partial-")
    # The name is free, and the next try succeeds.
    convert(open_donor(hf, families), out / "student", "heirloom", verify=False)
    assert open_donor(out / "student", families).format == "heirloom"

"""The runner, on the smoke recipes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from heirloom.common import config
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.errors import InputError
from heirloom.common.mesh import MeshConfig, start
from heirloom.common.train import recipe


def emoji(**fields):
    return replace(config.load("tinyclip/emoji"), **fields)


def test_a_student_for_a_pod_is_inherited_on_any_machine(tmp_path):
    pod = emoji(mesh=MeshConfig(fsdp=4096))
    with pytest.raises(InputError):
        start(pod.mesh)
    record = pod.inherit(tmp_path / "student")
    assert record["source"] == "embedded:emoji" and record["fraction"] > 0.9
    parts = emoji().parts()
    expected = recipe.initial(emoji(), parts, recipe.open_sources(parts, start()), None)
    for path, value in open_safetensors(tmp_path / "student" / "model.safetensors").items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_a_students_start_is_scored_without_its_teacher(one_device, monkeypatch):
    opened = []
    cfg = emoji(teacher="hf:nobody/none")  # not there, and not needed
    parts = cfg.parts()
    parts = replace(parts, open=lambda source: opened.append(source) or emoji().parts().open(source))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert recipe.evaluate(cfg, parts).n == 900 and opened == ["embedded:emoji"]

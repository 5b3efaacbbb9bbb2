"""What a resume may change, in words, and what damage to the files of a run leads to."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from heirloom.common import config
from heirloom.common.cli import main
from heirloom.common.errors import InputError, Remark
from heirloom.common.paths import METRICS
from heirloom.common.train import recipe
from heirloom.common.train.loop import Run
from heirloom.common.train.metrics import MetricsFile
from heirloom.common.train.recipe import BaseConfig
from heirloom.common.train.resume import with_defaults

LINES = "".join(
    json.dumps({"step": step, "loss": 1 / step, "eval/top1": 0.5, "timing": {"seconds": 1.5}}) + "\n"
    for step in (5, 10, 15, 20)
)


def emoji(**fields):
    return replace(config.load("tinyclip/emoji"), **fields)


def begun(folder, cfg):
    """Makes the folder of a run that was begun with a config."""
    Run.open(folder, asdict(cfg))
    (folder / METRICS).write_text(LINES)
    return folder


def said(folder, cfg):
    """Opens a run again; returns the changes that it names."""
    with pytest.warns(Remark) as found:
        Run.open(folder, asdict(cfg), defaults=partial(with_defaults, cfg=cfg))
    return [str(one.message).removeprefix(f"{folder} continues with a change: ") for one in found]


def test_each_change_that_a_resume_may_have_is_named(tmp_path):
    before = emoji(donor="/old/donor", teacher="/old/teacher")
    begun(tmp_path, before)
    now = replace(
        before,
        steps=before.steps + 7,
        log_every=3,
        eval_every=9,
        save_every=11,
        keep_last=5,
        keep_every=22,
        keep_minutes=30,
        donor="/new/donor",
        teacher="/new/teacher",
        data=replace(before.data, path="/new/data"),
        held_out=replace(before.held_out, path="/new/held_out"),
        step=replace(before.step, max_skipped=12),
    )
    assert sorted(said(tmp_path, now)) == sorted(
        [
            f"steps: {before.steps} before, {now.steps} now; schedules that depend on the number of steps are computed "
            "anew",
            f"log_every: {before.log_every} before, 3 now",
            f"eval_every: {before.eval_every} before, 9 now",
            f"save_every: {before.save_every} before, 11 now",
            "keep_last: 2 before, 5 now",
            "keep_every: 0 before, 22 now",
            "keep_minutes: 0 before, 30 now",
            'donor: "/old/donor" before, "/new/donor" now',
            'teacher: "/old/teacher" before, "/new/teacher" now',
            f'data.path: "{before.data.path}" before, "/new/data" now',
            f'held_out.path: "{before.held_out.path}" before, "/new/held_out" now',
            f"step.max_skipped: {before.step.max_skipped} before, 12 now",
        ]
    )
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(asdict(now)))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"teacher": "/a"}, {"teacher": ""}),
        ({"teacher": ""}, {"teacher": "/a"}),
        ({"donor": "/a"}, {"donor": ""}),
        ({"teacher": "cache:/a"}, {"teacher": "cache:/b"}),
        ({"teacher": "/a"}, {"teacher": "embeddings"}),
        ({"teacher": "/a"}, {"teacher": "logits"}),
        ({"teacher": "logits"}, {"teacher": "hf:a/b"}),
        ({"seed": 0}, {"seed": 1}),
        ({"depth_rule": "interval"}, {"depth_rule": "even"}),
    ],
)
def test_what_makes_another_training_is_refused(tmp_path, before, now):
    begun(tmp_path, emoji(**before))
    (name, old), (_, new) = *before.items(), *now.items()
    with pytest.raises(InputError) as refused:
        Run.open(tmp_path, asdict(emoji(**now)))
    assert str(refused.value).endswith(f"set it back: {name}: {json.dumps(old)} before, {json.dumps(new)} now")
    assert json.loads((tmp_path / "config.json").read_text())[name] == old


def test_fields_of_a_newer_version_take_their_defaults(tmp_path):
    cfg = emoji()
    begun(tmp_path, cfg)
    old = json.loads((tmp_path / "config.json").read_text())
    del old["keep_last"], old["step"]["max_skipped"], old["masks"], old["writers"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert with_defaults(old, cfg) == json.loads(json.dumps(asdict(cfg)))
    assert said(tmp_path, replace(cfg, keep_last=7)) == ["keep_last: 2 before, 7 now"]


@dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclass(frozen=True)
class Newer:
    name: str
    sizes: tuple[Inner, ...] = (Inner(), Inner(4))
    inner: Inner = field(default_factory=lambda: Inner(5))


def test_defaults_are_those_of_the_field_as_json():
    assert with_defaults({}, Newer("a", inner=Inner(9))) == {"sizes": [{"size": 3}, {"size": 4}], "inner": {"size": 5}}
    assert with_defaults({"name": "b", "inner": {}, "sizes": [{}, {"size": 8}]}, Newer("a")) == {
        "name": "b",
        "inner": {"size": 3},
        "sizes": [{"size": 3}, {"size": 8}],
    }


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    begun(tmp_path, emoji(steps=50))
    (tmp_path / "checkpoints" / "30").mkdir(parents=True)
    with pytest.raises(InputError, match=r"steps is 20, but .* is at step 30; choose 30 or more"):
        Run.open(tmp_path, asdict(emoji(steps=20)))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 50


def test_a_moved_donor_must_have_the_same_weights(tmp_path):
    """Path changes, weights do not: it continues. Then other weights: it is refused."""

    def begin(source):
        parts = emoji(teacher=source).parts()
        opened = recipe.Opened(mesh=None, donor=None, teacher=parts.open(source))
        recipe.same_sources(Run.open(tmp_path / "run", {}), parts, opened)

    begin("embedded:emoji")
    record = json.loads((tmp_path / "run" / "sources.json").read_text())
    assert record.keys() == {"teacher"} and len(record["teacher"]["sha256"][0]) == 64
    emoji().inherit(tmp_path / "other")
    with pytest.raises(InputError) as refused:
        begin(str(tmp_path / "other"))
    assert str(refused.value) == (
        f"{tmp_path / 'other'} has other weights than the teacher that {tmp_path / 'run'} began with (embedded:emoji); "
        "give the same weights, or start a new run"
    )
    assert json.loads((tmp_path / "run" / "sources.json").read_text()) == record
    moved = tmp_path / "moved"
    moved.symlink_to(emoji().parts().open("embedded:emoji").path)
    begin(str(moved))
    changed = json.loads((tmp_path / "run" / "sources.json").read_text())
    assert changed["teacher"]["path"] == str(moved) and changed["teacher"]["sha256"] == record["teacher"]["sha256"]


def test_other_weights_under_the_path_of_before_are_refused(tmp_path):
    emoji().inherit(tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    parts, run = emoji(teacher=str(tmp_path / "teacher")).parts(), Run.open(tmp_path / "run", {})

    def resume():
        recipe.same_sources(run, parts, recipe.Opened(mesh=None, donor=None, teacher=parts.open(parts.teacher)))

    resume()
    os.utime(file, (1, 1))  # copied, with the same content
    recipe.unchanged(run.directory)
    resume()
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    message = rf"{tmp_path / 'teacher'} has other weights than the teacher that {run.directory} began with; give the"
    with pytest.raises(InputError, match=message):
        resume()
    with pytest.raises(InputError, match=message):
        recipe.unchanged(run.directory)  # of a finished run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_last": 0}, "keep_last is 0: choose 1 or more"),
        ({"keep_minutes": -1}, "keep_minutes is -1: choose a number from 0 to below"),
        ({"keep_every": 1500}, "keep_every is 1500, but states are saved every 1000 steps: choose a multiple"),
    ],
)
def test_which_states_stay_must_make_sense(fields, message):
    with pytest.raises(InputError, match=message):
        BaseConfig(**fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (LINES.replace('"loss": 0.1,', '"loss" 0.1,'), "line 2 is damaged (Expecting ':' delimiter"),
        (LINES.replace('"loss": 0.1,', '"loss": 1e999,'), "line 2 is damaged (its loss is inf)"),
        (LINES.replace('"step": 15,', '"step": 1,'), "line 3 is damaged (its step is 1 after 10)"),
        (LINES.replace('"step": 15,', '"stop": 15,'), "line 3 is damaged (its step is None after 10)"),
        (LINES.replace('"loss": 0.2,', '"loss": NaN,'), "line 1 is damaged (NaN is not written)"),
        (LINES.replace('"loss": 0.2,', ""), "line 1 is damaged (its loss is absent)"),
        ("[1]\n" + LINES, "line 1 is damaged (a JSON list is not an object)"),
    ],
)
def test_a_damaged_line_of_metrics_is_one_line_and_exit_code_2(tmp_path, capsys, damage, message):
    begun(tmp_path, emoji())
    (tmp_path / METRICS).write_text(damage)
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith(f"heirloom: {tmp_path / METRICS}: ")
    assert "copy the file back from a backup, or delete that line" in err


def test_half_a_last_line_is_dropped(tmp_path):
    (tmp_path / METRICS).write_text(LINES + '{"step": 25, "lo')
    assert [line["step"] for line in MetricsFile(tmp_path / METRICS).lines()] == [5, 10, 15, 20]


def mutate(rng, data: bytes) -> bytes | None:
    """Flips up to three bits, cuts the end, or removes some bytes or all (None) of a file."""
    kind, at = rng.integers(8), int(rng.integers(len(data)))
    if kind == 0:
        return None
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + int(rng.integers(1, 20)) :]
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        out[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(out)


@pytest.mark.parametrize("name", [METRICS, "config.json"])
def test_any_damage_is_an_input_error_or_harmless(tmp_path, name, recwarn):
    rng, cfg = np.random.default_rng(0), emoji()
    begun(tmp_path, cfg)
    whole = {file: (tmp_path / file).read_bytes() for file in (METRICS, "config.json")}
    refused = 0
    for _ in range(200):
        for file, data in whole.items():
            (tmp_path / file).write_bytes(data)
        damaged = mutate(rng, whole[name])
        Path(tmp_path / name).unlink() if damaged is None else (tmp_path / name).write_bytes(damaged)
        try:
            run = Run.open(tmp_path, asdict(cfg), defaults=partial(with_defaults, cfg=cfg))
            file = MetricsFile(run.directory / METRICS)
            lines = file.lines()
            file.truncate(10)
            assert [line["step"] for line in file.lines()] == [line["step"] for line in lines if line["step"] <= 10]
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 100 < refused < 200  # some damage is of a digit, or of the last line alone


def test_a_damaged_config_of_a_run_is_exit_code_2(tmp_path, capsys):
    begun(tmp_path, emoji())
    (tmp_path / "config.json").write_text('{"steps": 1')
    assert main(["train", "tinyclip/emoji", "--run", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"heirloom: {tmp_path / 'config.json'}: cannot be read as JSON") and err.count("\n") == 1

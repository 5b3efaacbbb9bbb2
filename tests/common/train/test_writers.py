"""Metrics that go elsewhere: a run is known by an id of its own, closed at its end, and errors are one line."""

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from heirloom.common.errors import InputError, Stopped
from heirloom.common.train.writers import TensorBoard, Trackio, WeightsAndBiases, WriterName, open_writers


@pytest.mark.parametrize(
    ("writer", "package", "extra"),
    [
        (lambda d: TensorBoard(d), "tensorboardX", "tensorboard"),
        (lambda d: WeightsAndBiases(d, {}), "wandb", "wandb"),
        (lambda d: Trackio(d, {}), "trackio", "trackio"),
    ],
)
def test_a_missing_package_says_what_to_install(writer, package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed: pip install 'heirloom-jax\[{extra}\]'"):
        writer(tmp_path)


def test_extras_are_named_like_writers():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert set(get_args(WriterName)) <= set(project["optional-dependencies"])


@pytest.fixture(params=["wandb", "trackio"])
def package(request, monkeypatch):
    """A stand-in of the package that keeps what `init` and `finish` are called with."""
    calls = SimpleNamespace(name=request.param, started=[], closed=[], lines=[])

    def init(**options):
        calls.started.append(options)
        log = lambda values, step: calls.lines.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda **how: calls.closed.append(how.get("exit_code", 0)))

    monkeypatch.setitem(sys.modules, request.param, SimpleNamespace(init=init))
    return calls


def opened(package, folder, error=None):
    folder.mkdir(parents=True, exist_ok=True)
    with open_writers([package.name], folder, {}, 0) as (writer,):
        writer.write(3, {"loss": 1.0})
        if error:
            raise error
    known_by = package.started[-1]
    return known_by["id" if package.name == "wandb" else "name"]


def test_runs_in_folders_of_one_name_are_not_one_run(package, tmp_path):
    first = opened(package, tmp_path / "a" / "run")
    assert opened(package, tmp_path / "b" / "run") != first
    assert opened(package, tmp_path / "a" / "run") == first, "a resume"
    assert [options["name"][:5] for options in package.started] == ["a-run", "b-run", "a-run"]
    assert package.lines == [(3, {"loss": 1.0})] * 3


def test_a_writer_is_closed_however_the_run_ends(package, tmp_path):
    opened(package, tmp_path / "stage_1")
    assert package.closed == [0], "the next stage has a run of its own"
    for error, code in ((Stopped("stopped"), 0), (InputError("diverged"), 1)):
        with pytest.raises(type(error)):
            opened(package, tmp_path / "stage_2", error)
        assert package.closed.pop() == (code if package.name == "wandb" else 0)


def test_a_writer_that_does_not_start_is_one_line(package, tmp_path, monkeypatch):
    def init(**options):
        raise ValueError("api_key not configured (no-tty)\ncall wandb.login")

    monkeypatch.setattr(sys.modules[package.name], "init", init)
    said = rf"{package.name} does not start \(api_key not configured \(no-tty\)\): log in"
    with pytest.raises(InputError, match=said):
        opened(package, tmp_path / "run")


def test_a_writer_that_cannot_be_closed_does_not_end_a_run(package, tmp_path, monkeypatch, remarks):
    def finish(**how):
        raise OSError("no network")

    run = SimpleNamespace(log=lambda values, step: None, finish=finish)
    monkeypatch.setattr(sys.modules[package.name], "init", lambda **options: run)
    with open_writers([package.name], tmp_path, {}, 0):
        pass
    assert remarks() == [f"writer {package.name} was not closed (no network): its last lines may be missing there"]

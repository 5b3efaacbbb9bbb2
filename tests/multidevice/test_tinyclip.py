"""TinyCLIP's trainer on one device, on several, and in several processes: always the same numbers."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from socket import create_server

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from pyarrow import parquet

from heirloom.common import config
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.state import Checkpoints
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.data import emoji
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.mesh import MeshConfig, shardings, start
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.plan import Source
from heirloom.common.train.parameters import load_params
from heirloom.common.train.state import create_state
from heirloom.common.train.step import make_step
from tinyclip_jax.inputs import captions
from tinyclip_jax.masks import MaskConfig
from tinyclip_jax.model import Clip
from tinyclip_jax.pretrained import Pretrained
from tinyclip_jax.train import loss_fn
from tinyclip_jax.zoo import FAMILY, open_clip_model

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("clip_recipe.py")
# What one process compiles, the next one that runs the same on as many devices need not.
CACHE = {name: os.environ[name] for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")}
LIMIT = 300  # seconds until a process that hangs is a failure
CFG = config.load(str(RECIPE))
WIDER = dict(width=240, heads=5, hidden=960)
TEACHER = replace(CFG.student, image=replace(CFG.student.image, **WIDER), text=replace(CFG.student.text, **WIDER))


def drawn(spec, seed):
    """Parameters of a model that has learned nothing, but in which nothing is idle."""
    rng = np.random.default_rng(seed)
    centre = {path: 1.0 if path.endswith("norm/scale") else 2.5 if path == "logit_scale" else 0.0 for path in spec}
    return {path: np.asarray(rng.normal(centre[path], 0.1, leaf.shape), np.float32) for path, leaf in spec.items()}


# In this process: a step on some of its eight devices


def loss_and_gradients(data, fsdp, tensor):
    """One step of the trainer's own wiring, with a live teacher: its metrics, and gradients as the step has them."""
    names, devices = ("data", "fsdp", "tensor"), jax.devices()[: data * fsdp * tensor]
    mesh = jax.make_mesh((data, fsdp, tensor), names, axis_types=(AxisType.Auto,) * 3, devices=devices)
    student, theirs = functional(Clip, CFG.student), functional(Clip, TEACHER)
    teacher = Donor(FAMILY, TEACHER, theirs, Source(theirs.spec, drawn(theirs.spec, 1)), "heirloom", Path(), Path())
    loss = loss_fn(replace(CFG, teacher="wider"), student, teacher)
    keep = optax.trace(decay=0)  # an optimizer whose state is the gradient
    step = make_step(loss, keep, student.spec, mesh, CFG.step, frozen=load_params(teacher, mesh))
    state = create_state(drawn(student.spec, 0), keep, student.spec, mesh)
    rng = np.random.default_rng(2)
    batch = {
        "image": rng.standard_normal((16, 16, 16, 3)).astype(np.float32),
        "text": rng.integers(1, 640, (16, 8)).astype(np.int32),
    }
    # Compiled without the optimiser's passes, which take most of the time and change nothing here.
    compiled = step.lower(state, batch).compile({"xla_backend_optimization_level": 0})
    state, metrics = compiled(state, batch, step.frozen)
    return {name: float(total / count) for name, (total, count) in metrics.items()}, state.opt.trace


@pytest.fixture(scope="module")
def alone():
    return loss_and_gradients(1, 1, 1)


@pytest.mark.parametrize(("shape", "split"), [((1, 2, 1), 13), ((8, 1, 1), 0), ((2, 2, 2), 13)])
def test_loss_and_gradients_are_those_of_one_device(shape, split, alone):
    metrics, gradients = loss_and_gradients(*shape)
    assert sum(not gradient.sharding.is_fully_replicated for gradient in gradients.values()) == split
    for name in ("loss", "affinity", "contrastive", "grad_norm"):
        assert metrics[name] == pytest.approx(alone[0][name], rel=1e-6), name
    assert metrics["affinity"] != pytest.approx(metrics["contrastive"], rel=1e-3)
    for path, expected in alone[1].items():
        # The keys' biases have no gradient: a constant added to all logits changes no softmax. Rounding is left.
        largest = float(np.abs(expected).max())
        assert largest < 1e-6 if path.endswith("key/bias") else largest > 1e-3, path
        np.testing.assert_allclose(gradients[path], expected, rtol=0, atol=1e-5 * largest + 1e-7, err_msg=path)


# In processes of their own: `heirloom train`


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A wider CLIP, for teacher and donor, and 40 held-out pairs."""
    folder, model = tmp_path_factory.mktemp("inputs"), functional(Clip, TEACHER)
    tokenizer = Tokenizer.train(captions(open_source(CFG.data)), TEACHER.text.vocab)
    Pretrained(TEACHER, model, drawn(model.spec, 1), Preprocess(TEACHER.image.size), tokenizer).save(folder / "wider")
    pairs = parquet.read_table(emoji.path("noto"), filters=[("split", "=", "test")])
    parquet.write_table(pairs.slice(0, 40), folder / "pairs.parquet")
    return folder


@pytest.fixture(scope="module")
def launch(inputs):
    """`launch(run, devices, mesh, **env)`: one process of a run."""
    wider, pairs = inputs / "wider", inputs / "pairs.parquet"
    flags = ["--teacher", wider, "--donor", wider, "--held-out.path", pairs]

    def launch(run, devices, mesh, **env):
        sizes = [
            word
            for name, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
            for word in (f"--mesh.{name}", str(size))
        ]
        command = [
            sys.executable,
            "-m",
            "heirloom.common.cli",
            "train",
            str(RECIPE),
            "--run",
            str(run),
            *map(str, flags),
            *sizes,
        ]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
        clean |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        clean |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | CACHE | env
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean)

    return launch


def finish(process, code=0):
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code, err[-3000:]
    return out


def await_step(process, step):
    """What a run prints up to the line of a step."""
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(f"step {step}/"):
            return "".join(said)
    raise AssertionError(process.stderr.read()[-3000:])


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def same_run(run, whole, rtol):
    """Every step once, each where the uninterrupted run was at that step, and the weights at the end."""
    found, expected = curve(run), curve(whole)
    assert [line["step"] for line in found] == list(range(1, CFG.steps + 1))
    assert [line["step"] for line in found if "eval/r1" in line] == [8, 16]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=rtol, err_msg=str(ours["step"]))
    same_weights(run, whole)


def same_weights(run, other, atol=1e-6):
    found, expected = (open_safetensors(folder / "model" / "model.safetensors") for folder in (run, other))
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=atol, err_msg=path)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The uninterrupted run, on the eight devices of this process."""
    run, wider = tmp_path_factory.mktemp("whole") / "run", str(inputs / "wider")
    held_out = SourceConfig(str(inputs / "pairs.parquet"))
    replace(CFG, teacher=wider, donor=wider, held_out=held_out, mesh=MeshConfig(2, 2, 2)).train(run)
    assert curve(run)[-1]["loss"] < curve(run)[0]["loss"]
    return run


@pytest.mark.slow
def test_a_run_moves_from_two_processes_that_are_killed_to_two_devices_and_back(launch, whole, tmp_path):
    run = tmp_path / "run"

    def pair():
        with create_server(("localhost", 0)) as server:
            job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{server.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
        job["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
        return [launch(run, 2, (1, 2, 2), JAX_PROCESS_ID=str(i), **job) for i in range(2)]

    processes = pair()
    await_step(processes[0], 5)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=LIMIT)
    # A save waits for the one before: after step 5 that of step 2 is complete, whatever became of step 4's.
    killed = Checkpoints(run / "checkpoints").latest()
    assert 2 <= killed < CFG.steps - 4 and not (run / "model").exists()

    alone = launch(run, 2, (1, 2, 1))
    said = await_step(alone, killed + 1)
    alone.send_signal(signal.SIGTERM)
    out = said + finish(alone, 75)
    assert first_step(out) == killed + 1 and "first caption" not in out  # it went on, and did not begin again
    stopped = int(re.search(rf"^stopped at step (\d+) of {CFG.steps}", out, re.MULTILINE)[1])
    assert Checkpoints(run / "checkpoints").latest() == stopped == len(curve(run)) and not (run / "model").exists()
    assert killed < stopped < CFG.steps

    out = [finish(process) for process in pair()]
    assert first_step(out[0]) == stopped + 1 and f"step {CFG.steps}/" in out[0] and "step" not in out[1]
    same_run(run, whole, rtol=1e-5)


def first_step(out):
    """The first step that a process reports."""
    return int(re.search(r"^step (\d+)/", out, re.MULTILINE)[1])


def test_masks_are_learned_and_cut_on_a_mesh_as_on_one_device(inputs, tmp_path, monkeypatch):
    wider = str(inputs / "wider")
    masks = MaskConfig(prune_step=4, target=0.3, warmup=2, lr=1.5)
    recipe = replace(CFG, student=TEACHER, teacher=wider, donor=wider, masks=masks, steps=6)
    replace(recipe, mesh=MeshConfig(2, 2, 2)).train(tmp_path / "mesh")
    split = [
        not where.is_fully_replicated
        for where in shardings(functional(Clip, TEACHER).spec, start(MeshConfig(2, 2, 2))).values()
    ]
    assert sum(split) == 13
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    recipe.train(tmp_path / "alone")
    found, expected = curve(tmp_path / "mesh"), curve(tmp_path / "alone")
    assert [line["step"] for line in found] == list(range(1, 7)) and ["sparsity" in line for line in found] == 4 * [
        True
    ] + 2 * [False]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5, err_msg=str(ours["step"]))
    mesh, alone = (open_clip_model(str(tmp_path / name / "model")) for name in ("mesh", "alone"))
    # the same channels, heads and units stay
    assert mesh.cfg == alone.cfg and alone.cfg.image.width < TEACHER.image.width
    # Less strict, far below a step's 1e-3: the masks' Adam has a small eps, and enlarges rounding.
    same_weights(tmp_path / "mesh", tmp_path / "alone", atol=1e-4)

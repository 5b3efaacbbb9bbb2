"""Trainings on several devices and processes: what must divide, is written once, and goes on elsewhere."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from heirloom.common import config, processes
from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.processes import on_first
from heirloom.common.train.loop import Stop
from heirloom.common.train.metrics import MetricsFile
from heirloom.common.train.optim import decayed
from heirloom.common.train.step import StepConfig
from weightgen.d2nwg.train import ADAMW
from weightgen.tokens import chunks
from weightgen.train import LoopConfig, placed
from weightgen.zoo.zoo import Zoo


@pytest.mark.parametrize(
    ("recipe", "flag"),
    [("generator", "--"), ("codec", "--"), ("encoder", "--"), ("d2nwg", "--stage1."), ("d2nwg", "--")],
)
def test_a_batch_that_devices_do_not_divide_is_refused_before_anything_is_read(recipe, flag, tmp_path, capsys):
    flags = ["--zoo", str(tmp_path / "none"), "--run", str(tmp_path / "run"), f"{flag}batch", "20"]
    assert main(["train", f"weightgen/{recipe}", *flags]) == 2
    said = capsys.readouterr().err
    name = f"{flag}batch".removeprefix("--")
    assert (
        f"a batch of 20 cannot be divided among 8 devices (mesh data x fsdp): set {name} to a multiple of 8, such as 16"
        in said
    )
    assert said.count("\n") == 1


def test_micro_batches_must_divide_too():
    mesh = start()
    LoopConfig(batch=16, step=StepConfig(accumulate=2)).check(mesh)
    with pytest.raises(
        InputError, match=r"a batch of 24 .* 8 devices .* x 2 micro-batches: set batch to a multiple of 16, such as 16"
    ):
        LoopConfig(batch=24, step=StepConfig(accumulate=2)).check(mesh)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of a small generator, with its zoo."""
    zoo = tmp_path_factory.mktemp("zoo")
    net = ["--net.features", "6", "--net.classes", "3", "--backend", "pixels"]
    assert main(["train", "weightgen/smoke", "--run", str(zoo), *net, "--members", "16", "--chunk", "16"]) == 0
    size = [
        "--denoiser.width",
        "16",
        "--denoiser.layers",
        "1",
        "--denoiser.heads",
        "2",
        "--denoiser.hidden",
        "16",
        "--latent",
        "3",
    ]
    return ["--zoo", str(zoo / "zoo"), *size, "--steps", "4", "--batch", "8", "--optim.warmup", "1", "--gate.force"]


def test_flags_of_before_are_taken_and_said(remarks):
    cfg = config.load("weightgen/generator", ["--loop.batch", "8", "--loop.optim.lr=0.5"])
    assert (cfg.batch, cfg.optim.lr) == (8, 0.5)
    assert remarks() == ["--loop.batch is --batch now", "--loop.optim.lr=0.5 is --optim.lr=0.5 now"]
    assert config.load("weightgen/d2nwg", ["--stage2.steps", "7", "--stage1.steps", "9"]).steps == 7
    with pytest.raises(InputError, match="stage2"):
        config.load("weightgen/generator", ["--stage2.steps", "7"])


@pytest.mark.parametrize("flag", ["--eval-every", "--eval_every"])
def test_a_flag_that_would_do_nothing_is_refused(flag):
    with pytest.raises(InputError, match="has no effect in this recipe: nothing is evaluated while it trains"):
        config.load("weightgen/generator", [flag, "7"])


def test_a_step_is_outlined_for_the_compiler(flags):
    cfg = config.load("weightgen/generator", flags)
    abstract = cfg.abstract(start())
    assert {name: x.shape[0] for name, x in abstract.batch.items()} == {"tokens": 8, "support": 8, "shots": 8}
    family, model = cfg.describe()
    assert abstract.flops == 8 * 6 * family.macs(model, functional(family.module, model).spec)
    assert "all-reduce" in abstract.step.lower(abstract.state, abstract.batch).compile().as_text()
    with pytest.raises(InputError, match="a batch of 12 cannot be divided among 8 devices"):
        config.load("weightgen/generator", [*flags, "--batch", "12"]).abstract(start())


def test_a_training_on_a_mesh_goes_on_on_one_device(flags, tmp_path, monkeypatch):

    def trained(folder, *mesh):
        return main(["train", "weightgen/generator", "--run", str(tmp_path / folder), *flags, *mesh])

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "requested", lambda self, step: step == 2)
        assert trained("parts", "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2") == 75
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert trained("parts") == 0 and trained("whole") == 0
    parts, whole = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in ("parts", "whole"))
    for path, leaf in whole.items():
        np.testing.assert_allclose(parts[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)
    losses = [
        [line["loss"] for line in MetricsFile(tmp_path / folder / "metrics.jsonl").lines()]
        for folder in ("parts", "whole")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_one_process_writes_and_the_others_wait_and_fail_with_it(monkeypatch):
    sent, done = [], []

    def fail():
        raise InputError("a full disk")

    def as_process(index, answer):
        def exchange(data):
            sent.append(data)
            return [data if index == 0 else answer, data]

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(processes, "exchange", exchange)

    as_process(0, None)
    on_first(lambda: done.append("first"))
    with pytest.raises(InputError, match="a full disk"):
        on_first(fail)
    written, failed, *_ = sent
    as_process(1, written)
    on_first(lambda: done.append("second"))
    as_process(1, failed)
    with pytest.raises(InputError, match="process 0 failed in what the others wait for"):
        on_first(lambda: done.append("second"))
    assert done == ["first"] and len(sent) == 4


def test_the_released_adamw_decays_every_parameter_it_trains():
    from weightgen.d2nwg.model import D2nwg, D2nwgConfig
    from weightgen.d2nwg.unet import UnetConfig
    from weightgen.d2nwg.vae import VaeConfig
    from weightgen.generator.conditions import SetConfig

    vae = VaeConfig(length=10, fdim=64, resolution=8, channels=8, multiples=(1,), blocks=1, latent=1)
    unet = UnetConfig(size=8, channels=8, multiples=(1,), attention=(8,), groups=4)
    cfg = D2nwgConfig(vae, unet, "set", SetConfig(6, hidden=8, inducing=4, out=8))
    spec = {
        path: leaf for path, leaf in functional(D2nwg, cfg).spec.items() if path.startswith(("unet/", "condition/"))
    }
    found = decayed(ADAMW, spec)
    assert all(found.values()) and any(path.endswith("bias") for path in found)


def test_a_run_goes_on_with_the_zoo_that_it_began_with():
    def stream(zoo, state=None):
        data = placed(lambda rng: {"tokens": zoo.tokens(np.arange(8))}, start(), 0, zoo)
        data.restore(state or data.state())
        return data.state()

    spec = chunks({"w": np.zeros(2, np.float32)})
    zoo = Zoo(np.ones((9, 2), np.float32), np.zeros(9, np.float32), np.zeros((9, 1), np.int32), None, spec)
    state = stream(zoo)
    assert state["networks"] == 9 and stream(replace(zoo, quality=zoo.quality + 1), state) == state
    stream(zoo, {"batches": 3, "seed": 0})  # of an earlier version
    for other in (replace(zoo, weights=2 * zoo.weights), replace(zoo, classes=zoo.classes + 1), zoo.first(8)):
        with pytest.raises(InputError, match=r"the data cannot be resumed: (zoo|networks) was"):
            stream(other, state)

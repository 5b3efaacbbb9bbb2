"""Trainings on several devices and in several processes: what must divide, what is written once, and going on elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.train.loop import Run
from heirloom.common.train.mesh import MeshConfig, start
from heirloom.common.train.optim import OptimConfig, decayed
from heirloom.common.train.step import StepConfig
from weightgen import train
from weightgen.d2nwg.train import ADAMW, D2nwgRecipe
from weightgen.train import LoopConfig, check_batch, fit, on_first, placed
from weightgen.zoo.nets import NetConfig, net


@pytest.mark.parametrize(
    ("recipe", "flag"),
    [("generator", "--loop"), ("codec", "--loop"), ("encoder", "--loop"), ("d2nwg", "--stage1"), ("d2nwg", "--stage2")],
)
def test_a_batch_that_devices_do_not_divide_is_refused_before_anything_is_read(recipe, flag, tmp_path, capsys):
    flags = ["--zoo", str(tmp_path / "none"), "--run", str(tmp_path / "run"), f"{flag}.batch", "20"]
    assert main(["train", f"weightgen/{recipe}", *flags]) == 2
    said = capsys.readouterr().err
    assert "a batch of 20 cannot be divided among 8 devices (mesh data x fsdp): set batch to a multiple of 8, such as 16" in said
    assert said.count("\n") == 1


def test_micro_batches_must_divide_too():
    mesh = start(MeshConfig())
    check_batch(LoopConfig(batch=16, step=StepConfig(accumulate=2)), mesh)
    with pytest.raises(InputError, match=r"a batch of 24 .* 8 devices .* x 2 micro-batches: set batch to a multiple of 16, such as 16"):
        check_batch(LoopConfig(batch=24, step=StepConfig(accumulate=2)), mesh)
    with pytest.raises(InputError, match=r"stage1\.mesh and stage2\.mesh differ"):
        D2nwgRecipe(stage1=LoopConfig(mesh=MeshConfig(fsdp=2)))


def test_a_training_goes_on_on_another_mesh(tmp_path):
    model = net(NetConfig("mlp", features=4, hidden=8, classes=2))
    cfg = LoopConfig(4, 8, OptimConfig(lr=1e-2, warmup=1, schedule="constant"), StepConfig(ema=0.9), save_every=2)

    def value(params, batch, key, frozen):
        return jnp.mean((model.apply(params, batch["x"]) - batch["y"]) ** 2), {}

    def run(folder, steps, **mesh):
        mesh = start(MeshConfig(**mesh))
        loop = LoopConfig(steps, cfg.batch, cfg.optim, cfg.step, save_every=2)
        make = lambda rng: {"x": rng.standard_normal((8, 4), np.float32), "y": rng.standard_normal((8, 2), np.float32)}  # noqa: E731
        init = lambda: model.init(jax.random.key(0))  # noqa: E731
        return fit(Run.open(tmp_path / folder, {}), loop, mesh, model.spec, init, value, placed(make, mesh, 0))

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, data=2, fsdp=4)
    for path, leaf in whole.items():
        np.testing.assert_allclose(parts[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
        assert np.abs(np.asarray(leaf) - np.asarray(model.init(jax.random.key(0))[path])).max() > 1e-4


def test_one_process_writes_and_the_others_wait_and_fail_with_it(monkeypatch):
    sent, done = [], []

    def fail():
        raise InputError("a full disk")

    def as_process(index, answer):
        def broadcast(value):
            sent.append(int(value))
            return np.int32(value if index == 0 else answer)

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(train.multihost_utils, "broadcast_one_to_all", broadcast)

    as_process(0, None)
    on_first(lambda: done.append("first"))
    with pytest.raises(InputError, match="a full disk"):
        on_first(fail)
    as_process(1, 0)
    on_first(lambda: done.append("second"))
    as_process(1, 1)
    with pytest.raises(InputError, match="process 0 could not write"):
        on_first(lambda: done.append("second"))
    assert done == ["first"] and sent == [0, 1, 0, 0]


def test_the_released_adamw_decays_every_parameter_it_trains():
    from heirloom.common.nn.functional import functional
    from weightgen.d2nwg.model import D2nwg, D2nwgConfig
    from weightgen.d2nwg.unet import UnetConfig
    from weightgen.d2nwg.vae import VaeConfig
    from weightgen.generator.conditions import SetConfig

    vae = VaeConfig(length=10, fdim=64, resolution=8, channels=8, multiples=(1,), blocks=1, latent=1)
    unet = UnetConfig(size=8, channels=8, multiples=(1,), attention=(8,), groups=4)
    cfg = D2nwgConfig(vae, unet, "set", SetConfig(6, hidden=8, inducing=4, out=8))
    spec = {path: leaf for path, leaf in functional(D2nwg, cfg).spec.items() if path.startswith(("unet/", "condition/"))}
    found = decayed(ADAMW, spec)
    assert all(found.values()) and any(path.endswith("bias") for path in found)

"""TinyCLIP's trainer on one device and on several: the same numbers."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from common import config
from common.checkpoint.convert import Donor
from common.nn.functional import functional
from common.surgery.plan import Source
from common.train.state import create_state
from common.train.step import make_step
from tinyclip_jax.evaluate import load_params
from tinyclip_jax.model import Clip
from tinyclip_jax.train import loss_fn
from tinyclip_jax.zoo import FAMILY

RECIPE = Path(__file__).with_name("clip_recipe.py")
CFG = config.load(str(RECIPE))
WIDER = dict(width=240, heads=5, hidden=960)
TEACHER = replace(CFG.student, image=replace(CFG.student.image, **WIDER), text=replace(CFG.student.text, **WIDER))


def drawn(spec, seed):
    """Parameters of a model that has learned nothing, but in which nothing is idle."""
    rng = np.random.default_rng(seed)
    centre = {path: 1.0 if path.endswith("norm/scale") else 2.5 if path == "logit_scale" else 0.0 for path in spec}
    return {path: np.asarray(rng.normal(centre[path], 0.1, leaf.shape), np.float32) for path, leaf in spec.items()}


def loss_and_gradients(data, fsdp, tensor):
    """Of one step of the trainer's own wiring, with a live teacher: its metrics, and the gradients where the step leaves them."""
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
        # The keys' biases have no gradient: a constant added to every logit of a row changes no softmax. What is left is rounding.
        largest = float(np.abs(expected).max())
        assert largest < 1e-6 if path.endswith("key/bias") else largest > 1e-3, path
        np.testing.assert_allclose(gradients[path], expected, rtol=0, atol=1e-5 * largest + 1e-7, err_msg=path)

import logging
import re
import resource
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from heirloom.common.checkpoint.state import Checkpoints, Keep
from heirloom.common.errors import InputError
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.state import abstract_state, create_state
from heirloom.common.train.step import StepConfig, make_step

# after a failed write orbax abandons its other writers
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def optimizer(spec):
    return make_optimizer(OptimConfig(lr=1e-2, warmup=0, frozen=("up/bias",)), spec, 100)


@pytest.fixture
def state(optimizer, spec, params, mesh):
    return create_state(params, optimizer, spec, mesh, ema=0.9)


@pytest.fixture
def like(optimizer, spec, mesh):
    return abstract_state(optimizer, spec, mesh, ema=0.9)


def host(tree):
    return jax.tree.map(np.array, tree)


def test_what_is_restored_is_what_was_saved_whatever_is_donated_meanwhile(
    tmp_path, loss, state, like, optimizer, spec, batch, mesh
):
    step = make_step(loss, optimizer, spec, mesh, StepConfig(ema=0.9))
    state, _ = step(state, batch)
    saved = host(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"data": {"next": 17}, "window": {"loss": [0.1 + 0.2, 3.0]}})
    for _ in range(20):
        state, _ = step(state, batch)
    checkpoints.wait()
    restored = Checkpoints(tmp_path).restore(1, like)
    assert jax.tree.structure(restored.state) == jax.tree.structure(saved)
    assert jax.tree.all(jax.tree.map(np.array_equal, host(restored.state), saved))
    assert jax.tree.all(
        jax.tree.map(lambda x, y: x.sharding == y.sharding and x.dtype == y.dtype, restored.state, like)
    )
    assert restored.data == {"data": {"next": 17}, "window": {"loss": [0.1 + 0.2, 3.0]}}


def test_what_is_counted_after_a_save_is_not_in_it(tmp_path, state, like, monkeypatch):
    counted, write = threading.Event(), ocp.JsonCheckpointHandler._save_fn

    async def after(*args):  # orbax writes in the background: here, when the caller went on
        assert counted.wait(60)
        await write(*args)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", after)
    checkpoints = Checkpoints(tmp_path)
    window = {"loss": [1.0, 1.0]}
    checkpoints.save(1, state, {"window": window})
    window["loss"][0] += 1.0
    counted.set()
    checkpoints.wait()
    assert checkpoints.restore(1, like).data == {"window": {"loss": [1.0, 1.0]}}


def test_a_state_that_an_earlier_release_wrote_is_restored(tmp_path, spec, params, mesh):
    """Its optimizer moved running statistics by plain gradient descent: a tree without that empty part is refused."""
    cfg = OptimConfig(lr=1e-2, warmup=0, frozen=("up/bias",))
    optimizer = make_optimizer(cfg, spec, 100)
    written = create_state(params, optimizer, spec, mesh)
    groups = written.opt.inner_states
    earlier = optax.sgd(0.1).init({})
    assert groups.keys() == {"trained", "followed", "frozen"}
    inner = groups | {"followed": groups["followed"]._replace(inner_state=earlier)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, replace(written, opt=written.opt._replace(inner_states=inner)), {})
    checkpoints.wait()
    restored = checkpoints.restore(1, abstract_state(optimizer, spec, mesh)).state
    assert jax.tree.structure(restored) == jax.tree.structure(written)
    assert jax.tree.all(jax.tree.map(np.array_equal, host(restored), host(written)))


def test_the_last_two_are_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, Keep(2))
    assert checkpoints.latest() is None
    for step in (10, 20, 30):
        checkpoints.save(step, state, {})
    checkpoints.wait()
    assert checkpoints.latest() == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "30"]


def test_a_half_written_state_is_never_picked(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state, {})
    checkpoints.wait()
    shutil.copytree(tmp_path / "10", tmp_path / "20.orbax-checkpoint-tmp")
    assert checkpoints.latest() == 10
    reopened = Checkpoints(tmp_path)
    assert reopened.latest() == 10
    reopened.save(20, state, {})
    reopened.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def test_a_disk_that_fails_is_the_users_to_mend_and_costs_no_older_state(tmp_path, state, like):
    checkpoints = Checkpoints(tmp_path, Keep(1))
    checkpoints.save(10, state, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"could not be (saved|written).*File too large"):
            checkpoints.save(20, state, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.latest() == 10
    assert np.array_equal(checkpoints.restore(10, like).state.params["up/kernel"], state.params["up/kernel"])
    checkpoints.save(30, state, {})  # with room again it goes on
    checkpoints.wait()
    assert checkpoints.latest() == 30


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from heirloom.common.checkpoint.state import Checkpoints
from heirloom.common.errors import InputError
checkpoints = Checkpoints(Path(sys.argv[1]))
tree = {str(i): np.random.default_rng(i).normal(size=4000) for i in range(40)}
checkpoints.save(1, tree, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, tree, {})
    checkpoints.wait()
except InputError as error:
    print(error, file=sys.stderr)
"""


def test_a_save_that_fails_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert re.fullmatch(r".* could not be (saved|written).*; the last state there is 1 .*\n", done.stderr), done.stderr


def test_what_orbax_only_logs_is_heard(tmp_path):
    """It raises what its saves log, and not what it cannot remove."""
    Checkpoints(tmp_path)
    try:
        raise OSError("no space")
    except OSError:
        raised = sys.exc_info()

    def heard(logger, module, text):
        record = logging.LogRecord(logger, logging.ERROR, f"orbax/{module}", 1, text, (), raised)
        return bool(logging.getLogger(logger).filter(record))

    assert not heard("absl", "checkpoint/_src/futures/future.py", "run() raised an exception")
    assert heard("absl", "checkpoint/_src/path/storage_backend.py", "Failed to remove checkpoint")
    assert not heard("asyncio", "", "Task exception was never retrieved, defined at orbax/checkpoint/save.py")
    assert heard("asyncio", "", "Task exception was never retrieved, defined at mine.py")


def test_a_damaged_state_is_named(tmp_path, state, like):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state, {})
    checkpoints.wait()
    for file in (tmp_path / "10" / "state").rglob("d/*"):
        file.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"10: cannot be restored; remove it to continue from the state before it"):
        checkpoints.restore(10, like)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/checkpoints: cannot write checkpoints here"):
        Checkpoints(tmp_path / "file" / "checkpoints")

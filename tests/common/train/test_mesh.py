import time
from concurrent.futures import ThreadPoolExecutor
from socket import create_connection, create_server

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from heirloom.common.errors import InputError
from heirloom.common.mesh import (
    MeshConfig,
    _announced,
    _launched_together,
    batch_sharding,
    devices,
    shardings,
    start,
)
from heirloom.common.rollcall import Job, roll_call
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.state import create_state


def leaf(axes, *shape):
    return Leaf(Axes.parse(axes), shape, np.dtype("float32"))


LEAVES = {
    "blocks/mlp/up/kernel": leaf("layer embed -> hidden", 2, 256, 512),
    "blocks/attn/query/kernel": leaf("layer embed -> head head_dim", 2, 256, 4, 64),
    "blocks/attn/three_heads/kernel": leaf("layer embed -> head head_dim", 2, 256, 3, 64),
    "mix/kernel": leaf("embed -> embed", 300, 300),
    "text/table": leaf("vocab -> embed", 1001, 256),
    "odd/kernel": leaf("embed -> hidden", 679, 101),
    "deep/bias": leaf("layer hidden", 512, 255),
    "blocks/mlp/up/bias": leaf("layer hidden", 2, 512),
}


def test_a_platform_without_devices_is_bad_input_and_a_busy_one_is_tried_again(monkeypatch):
    def fails(error):
        def devices():
            raise error

        monkeypatch.setattr(jax, "devices", devices)

    for error in (AssertionError(), RuntimeError("Unable to initialize backend 'tpu': INTERNAL: no libtpu.so")):
        fails(error)
        with pytest.raises(InputError, match=r"no device can be used \(.+\); set JAX_PLATFORMS=cpu, or install"):
            start()
    fails(RuntimeError("ABORTED: The TPU is already in use by process with pid 7"))
    with pytest.raises(RuntimeError, match="already in use"):
        start()
    with pytest.raises(InputError):
        devices()


def test_layout_by_name_then_by_size(mesh):
    found = {path: sharding.spec for path, sharding in shardings(LEAVES, mesh).items()}
    assert found == {
        "blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "blocks/attn/query/kernel": P(None, "fsdp", "tensor", None),
        "blocks/attn/three_heads/kernel": P(None, "fsdp", None, None),
        "mix/kernel": P("fsdp", None),
        "text/table": P(None, "fsdp"),
        "odd/kernel": P(None, None),
        "deep/bias": P(None, None),
        "blocks/mlp/up/bias": P(),
    }


def test_bytes_per_device(mesh):
    # by hand, in f32: quarters of 262,144 and 131,072, halves of 98,304, 90,000 and 256,256, wholes of the rest
    expected = 4 * (65_536 + 32_768 + 49_152 + 45_000 + 128_128 + 68_579 + 130_560 + 1_024)
    optimizer = make_optimizer(OptimConfig(warmup=0), LEAVES, 10)
    params = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in LEAVES.items()}
    state = create_state(params, optimizer, LEAVES, mesh, ema=0.99)
    for device in jax.devices():
        assert bytes_on(device, state.params) == expected
        assert bytes_on(device, state.ema) == expected
        # two moments, and four scalars: two step counts, the count of the schedule and its rate
        assert bytes_on(device, state.opt) == 2 * expected + 4 * 4


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == device
    )


def test_rows_are_split_over_data_and_fsdp(mesh):
    assert batch_sharding(mesh).shard_shape((32, 7)) == (8, 7)


def test_minus_one_is_the_rest():
    mesh = start(MeshConfig(data=-1, fsdp=2, tensor=1))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-1, 16, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(InputError, match="does not make 8 devices"):
        start(MeshConfig(*sizes))


def free_port():
    with create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def call_all(address, processes, ids, limit):
    with ThreadPoolExecutor() as pool:
        return [call.exception() for call in [pool.submit(roll_call, Job(address, processes, i), limit) for i in ids]]


def test_roll_call_of_all():
    assert call_all(f"localhost:{free_port()}", 3, [2, 0, 1], limit=30) == [None] * 3


@pytest.mark.parametrize("sent", [b"null\n", b"{}\n", b"1\n", b'"1"\n', b"[" * 9000 + b"\n", b"GET / HTTP/1.1\r\n"])
def test_roll_call_takes_no_stranger_for_a_process(sent):
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(roll_call, Job(f"localhost:{port}", 2, 0), 30)
        for _ in range(100):
            try:
                with create_connection(("localhost", port)) as stranger:
                    stranger.sendall(sent)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        second = pool.submit(roll_call, Job(f"localhost:{port}", 2, 1), 30)
        assert first.exception() is None and second.exception() is None


def test_roll_call_names_who_is_missing_to_everybody():
    address = f"localhost:{free_port()}"
    errors = call_all(address, 4, [0, 2], limit=0.5)
    assert [type(error) for error in errors] == [InputError] * 2
    assert {str(error) for error in errors} == {
        f"after 0.5 s process 1, 3 of 4 has not reported to {address}: start it, or check its log, then start all of"
        " them again"
    }


def test_roll_call_without_process_0():
    (error,) = call_all(f"localhost:{free_port()}", 2, [1], limit=0.3)
    assert isinstance(error, InputError) and "process 1 found no process 0" in str(error)


def test_roll_call_finds_twins():
    errors = call_all(f"localhost:{free_port()}", 3, [0, 1, 1], limit=30)
    assert ["a second process calls itself 1 of 3" in str(error) for error in errors] == [True] * 3


def test_a_job_is_announced_by_three_variables():
    given = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert _announced(given) == Job("host:1234", 2, 1)
    assert _announced({}) is None
    for name in given:
        with pytest.raises(InputError, match=f"{name} is 'x'"):
            _announced(given | {name: "x"})


def test_a_job_is_launched_by_slurm_mpi_or_a_pod():
    assert _launched_together({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"})
    assert _launched_together({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not _launched_together({"SLURM_NTASKS": "2", "TPU_WORKER_HOSTNAMES": "localhost"})

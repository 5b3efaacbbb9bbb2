"""Eight CPU devices, exact matmuls and quick compiles, set before anything asks JAX for a device."""

import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

# Read when jax is imported, also by processes of tests: compiling for one small run is most of a test's time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters (until jaxlib 0.10) compile in half the time; an unknown flag would end the process.
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
# And what was compiled once is kept, for the other processes and for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Two processes now and then write one entry at once, and JAX warns of it. (For this process: pyproject.toml.)
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error writing persistent compilation cache entry")

import jax
import numpy as np
import pytest
from beartype import beartype
from hypothesis import settings
from jaxtyping import jaxtyped

import heirloom.common.vit.model
import learngene.losses
import tinyclip_jax.losses
import tinyclip_jax.masks
import tinyclip_jax.model
from heirloom.common.errors import Remark

# Indexes and downloads: a test must not find what an earlier run has left in the cache of this machine.
_CACHE = tempfile.TemporaryDirectory(prefix="heirloom-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# Collectives on a CPU hold a thread each until all devices are there, of a pool as large as the machine or the number
# of devices: on two cores a step with many of them waited for ever. In a larger pool it does not; XLA reads its size
# from here.
os.environ.setdefault("NPROC", "64")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

# Tests check the shapes of these; product runs do not pay. Before other modules import them by name.
SHAPED = {
    tinyclip_jax.losses: ("affinity_mimicking", "contrastive", "similarity"),
    tinyclip_jax.masks: (
        "open_probability",
        "sample_gate",
        "deterministic_gate",
        "remaining",
        "sparsity",
        "constraint",
    ),
    tinyclip_jax.model.Clip: ("__call__", "encode_image", "encode_text"),
    learngene.losses: ("cross_entropy", "distillation"),
    heirloom.common.vit.model: ("stochastic_depth",),
    heirloom.common.vit.model.Vit: ("__call__", "embed", "classify"),
}
for owner, names in SHAPED.items():
    for name in names:
        setattr(owner, name, jaxtyped(typechecker=beartype)(getattr(owner, name)))

settings.register_profile("heirloom", deadline=None, derandomize=True)
settings.load_profile("heirloom")


# The longest files begin first, so that no process is left alone with one at the end.
LONGEST = (
    "tests/weightgen/test_generate.py",
    "tests/tinyclip_jax/test_train.py",
    "tests/tinyclip_jax/test_stages.py",
    "tests/multidevice/",
    "tests/lit_jax/",
    "tests/learngene/test_train.py",
    "tests/tinyclip_jax/",
    "tests/parity/",
    "tests/weightgen/",
    "tests/learngene/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: next((i for i, prefix in enumerate(LONGEST) if item.nodeid.startswith(prefix)), len(LONGEST))
    )


@pytest.fixture(scope="module")
def one_device():
    """Whole runs on one of the fake devices: eight of them on two cores wait for one another most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture
def remarks():
    """`remarks()`: what was remarked since the last call, each text once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Remark)

        def take() -> list[str]:
            texts = list(dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, Remark)))
            caught.clear()
            return texts

        yield take


@pytest.fixture(scope="session")
def draw():
    """`draw(spec, seed)`: parameters far from their initial values, so that no gate is closed."""

    def draw(spec, seed=0):
        rng = np.random.default_rng(seed)
        scale = {path: leaf.extent("read") ** -0.5 if path.endswith("kernel") else 0.2 for path, leaf in spec.items()}
        return {path: (scale[path] * rng.standard_normal(leaf.shape)).astype(np.float32) for path, leaf in spec.items()}

    return draw

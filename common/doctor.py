"""`heirloom doctor`: is this machine ready, and if not, what to type."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from heirloom.common.errors import InputError

PACKAGES: tuple[str, ...] = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
PACKAGES += ("tensorflow-datasets", "torch", "transformers")
# Flax follows JAX closely. The oldest flax that was tested with each minor version of jax:
PAIRS: dict[tuple[int, ...], str] = {(0, 12): "0.12.12", (0, 11): "0.12.9", (0, 10): "0.12.8"}
SIZE = 2048
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = "glibc.malloc.hugetlb=1"


def examine(more: Sequence[Callable[[], str]] = ()) -> dict[str, Any]:
    """Print versions, backend and devices, multiply two matrices; return it as data. more: lines that methods add.

    Raises InputError, saying what to type, for a pair of versions that do not go together or a device that does not
    compute.
    """
    found = {name: installed for name in PACKAGES if (installed := _version(name))}
    print(f"python {platform.python_version()}, " + ", ".join(f"{name} {v}" for name, v in found.items()))
    check_pair(found["jax"], found["flax"])

    import jax
    import jax.numpy as jnp

    from heirloom.common.mesh import devices

    here = devices()
    kinds = sorted({d.device_kind for d in here})
    print(f"backend {jax.default_backend()}: {len(here)} x {', '.join(kinds)}, {jax.process_count()} process(es)")

    x = jnp.ones((SIZE, SIZE), jnp.float32) / SIZE
    multiply = jax.jit(lambda x: x @ x)
    deviation = float(jnp.abs(multiply(x) - 1 / SIZE).max())
    started = time.perf_counter()
    multiply(x).block_until_ready()
    rate = 2 * SIZE**3 / (time.perf_counter() - started) / 1e9
    if deviation > 1e-6:
        raise InputError(f"a {SIZE} x {SIZE} matmul is off by {deviation:.1e} on {kinds[0]}: reinstall jax for it")
    print(f"matmul {SIZE} x {SIZE} in f32: {rate:,.0f} GFLOP/s")
    if jax.default_backend() == "cpu":
        hint = _accelerator_hint()
        extras = "pip install 'heirloom-jax[cuda]' or 'heirloom-jax[tpu]' on its machine"
        print(hint or f"no accelerator here; for one, {extras}")
        if not hint and _huge_pages_unused():
            print(f"training here is up to a fifth faster in huge pages: start it with GLIBC_TUNABLES={HUGE}")
    if "torch" not in found:
        what = ".pt files cannot be read, conversions are checked by structure only"
        print(f"no torch: {what} (pip install 'heirloom-jax[torch]')")
    for line in more:
        print(line())
    print("ready")
    about = {"versions": found, "backend": jax.default_backend(), "devices": len(here)}
    return about | {"kinds": kinds, "gflops": rate}


def check_pair(jax: str, flax: str) -> None:
    """Raise InputError when this flax is older than the one this jax was tested with."""
    needed = PAIRS.get(Version(jax).release[:2])
    if needed is None:
        raise InputError(f"jax {jax} is not supported (0.10 to 0.12 are): pip install 'jax>=0.10.2,<0.13'")
    if Version(flax) < Version(needed):
        raise InputError(f"jax {jax} needs flax {needed} or newer, here is {flax}: pip install -U 'flax>={needed}'")


def _huge_pages_unused() -> bool:
    """Whether Linux has huge pages for programs that ask for them, and ours would not ask (docs/speed.md)."""
    if platform.libc_ver()[0] != "glibc" or HUGE in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return HUGE_PAGES.is_file() and "[madvise]" in HUGE_PAGES.read_text()


def _accelerator_hint() -> str | None:
    if Path("/dev/nvidia0").exists():
        return "an NVIDIA GPU is here but jax runs on the CPU: pip install -U 'heirloom-jax[cuda]'"
    if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
        return "a TPU seems to be here but jax runs on the CPU: pip install -U 'heirloom-jax[tpu]'"
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

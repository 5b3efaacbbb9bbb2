"""Compiling for a Hopper GPU on a machine without one: needs JAX's CUDA plugin and NVIDIA's compiler.

pip install 'jax[cuda13-local]' nvidia-cuda-nvcc nvidia-nvvm     (the last two unless a CUDA toolkit is installed)
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" device_description_str: "NVIDIA H200" runtime_version { major: 13 } dnn_version_info { major: 9 minor: 10 }
"""
"""An H200 by its data sheet."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def hopper():
    """One H200, as a sharding."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h200", topology="1x1x1", target_config=TARGET
        )
    except Exception as error:
        pytest.skip(f"no CUDA plugin of JAX (pip install 'jax[cuda13-local]'): {str(error).splitlines()[0]}")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    try:
        jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "PTX compilation provider" not in str(error):
            raise
        pytest.skip("no compiler for PTX (pip install nvidia-cuda-nvcc nvidia-nvvm, or a CUDA toolkit)")
    return sharding

"""Eight CPU devices and exact matmuls, set before anything asks JAX for a device."""

import jax
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

settings.register_profile("heirloom", deadline=None, derandomize=True)
settings.load_profile("heirloom")

"""One of two processes that tell each other things; what it saw goes to stdout, as JSON."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from heirloom.common.errors import InputError
from heirloom.common.mesh import MeshConfig, start
from heirloom.common.processes import from_first, on_first, together, whole_on_first

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
mesh = start(MeshConfig(data=2, fsdp=2), patience=60)
own, said = jax.process_index(), {}


def message(call, work):
    try:
        return call(work)
    except InputError as error:
        return str(error)


def fails(process):
    def work():
        if process == own:
            raise InputError("no room")
        return f"of {own}"

    return work


said["first"] = [message(on_first, lambda: {"own": own}), message(on_first, fails(0))]
began = time.monotonic()
said["slow"] = [together(lambda: time.sleep(2.5 * own)), time.monotonic() - began > 2]
said["together"] = [together(lambda: own), message(together, fails(1)), message(together, fails(None))]

values = {"a": np.float32([-0.0, 0.0, np.nan, 1e-40]), "b": np.array(-7, np.int32), "c": np.ones(8, "bfloat16")}
split = {name: NamedSharding(mesh, PartitionSpec("fsdp" if np.ndim(value) else None)) for name, value in values.items()}
split["b"] = NamedSharding(mesh, PartitionSpec())
like = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=split[name]) for name, v in values.items()}
placed = from_first(values if own == 0 else None, like)
assert placed["a"].sharding == split["a"] and placed["c"].dtype == jnp.bfloat16
whole = whole_on_first(placed)
there = {name: value for name, value in whole.items() if value is not None}
said["whole"] = [name for name, value in there.items() if value.tobytes() == values[name].tobytes()]
print(json.dumps(said))
sys.exit(0)

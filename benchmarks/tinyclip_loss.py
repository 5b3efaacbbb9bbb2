"""The loss at scale: affinity mimicking with its own way back against the matrices whole, over 8 simulated devices.

    python benchmarks/tinyclip_loss.py --json benchmarks/results/tinyclip_loss.json

Per global batch: seconds of value and gradients, temporary memory of the compiled program per device, and the largest
relative error of the gradients. Beyond `--run-up-to` nothing is run and only the compiler's memory is read. Simulated
devices share the cores of one CPU: times compare the two forms with each other and with nothing else.
"""

import os

os.environ.setdefault("NPROC", "64")  # collectives on a CPU hold a thread each

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import bench
from tinyclip_jax.losses import affinity_mimicking, similarity

DEVICES, JOINT, SCALE = 8, 512, 50.0


def whole(image: Any, text: Any, teacher_image: Any, teacher_text: Any, scale: Any, teacher_scale: Any) -> jax.Array:
    """As the paper writes it down: two matrices of all pairs, which the compiler shares out over the devices."""
    logits, target = scale * similarity(image, text), teacher_scale * similarity(teacher_image, teacher_text)

    def rows(logits: jax.Array, target: jax.Array) -> jax.Array:
        return -(jax.nn.softmax(target) * jax.nn.log_softmax(logits)).sum(-1).mean()

    return (rows(logits, target) + rows(logits.T, target.T)) / 2


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--run-up-to", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    rows, one = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    results = []
    for batch in args.batch:
        row: dict[str, Any] = {"batch": batch}
        gradients = {}
        for name, loss in {"whole": whole, "chunked": affinity_mimicking}.items():
            step = jax.jit(
                jax.value_and_grad(loss, argnums=(0, 1)),
                in_shardings=(rows,) * 4 + (one,) * 2,
                out_shardings=(one, (rows, rows)),
            )
            shapes = [jax.ShapeDtypeStruct((batch, JOINT), jnp.float32)] * 4
            with jax.set_mesh(mesh):
                compiled: Any = step.lower(*shapes, SCALE, SCALE).compile()
            row[name] = {"megabytes": compiled.memory_analysis().temp_size_in_bytes / 2**20}
            if batch <= args.run_up_to:
                features = [jax.device_put(unit(seed, batch), rows) for seed in range(4)]
                gradients[name], row[name]["seconds"] = timed(compiled, (*features, SCALE, SCALE), args.repeats)
        if gradients:
            row["error"] = max(relative(a, b) for a, b in zip(gradients["chunked"], gradients["whole"], strict=True))
        results.append(row)
        print(told(row), flush=True)
    bench.write(
        args.json, bench.header(("jax", "flax"), device=f"{bench.CPU}, {DEVICES} simulated devices") | {"rows": results}
    )


def unit(seed: int, batch: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((batch, JOINT), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def timed(compiled: Any, inputs: tuple[Any, ...], repeats: int) -> tuple[list[np.ndarray], float]:
    """Gradients, and the median seconds after a first call that does not count."""
    gradients = [np.asarray(x) for x in compiled(*inputs)[1]]
    return gradients, statistics.median(bench.timed(lambda: compiled(*inputs), repeats))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def told(row: dict[str, Any]) -> str:
    text = f"batch {row['batch']:>6}"
    for name in ("whole", "chunked"):
        seconds = row[name].get("seconds")
        text += f"   {name} {row[name]['megabytes']:>8.1f} MiB per device" + (
            f" {seconds:>6.2f} s" if seconds is not None else ""
        )
    return text + (f"   error {row['error']:.1e}" if "error" in row else "")


if __name__ == "__main__":
    main()

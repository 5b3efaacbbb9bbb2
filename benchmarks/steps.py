"""A training step and a sampling run of the published models, random weights and data: time, MFU, memory.

    python benchmarks/steps.py --json benchmarks/results/steps_gpu.json          # one large GPU, five minutes
    python benchmarks/steps.py --smoke                                           # toy sizes, to see that it runs

Batches are what one device of 80 GB takes, not the recipes'; the step is the recipe's, teacher included, in its
precision. DiT-XL/2 has no recipe: its step is that of the other DiTs. LiT-XL/2's attention is once what is chosen for
the device, once the kernels for Hopper.
"""

import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench
from heirloom.common import config
from heirloom.common.chips import peak_flops
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from lit_jax.dit import Dit
from lit_jax.recipes import imagenet
from lit_jax.sample import SampleConfig, drawer
from lit_jax.zoo import dit, lit

TOY = {"lit/smoke": 4, "tinyclip/smoke": 4}  # examples in a batch
DRAW = {"LiT-XL/2": lit("xl"), "DiT-XL/2": dit("xl")}


def recipes() -> dict[str, tuple[Any, int]]:
    """{what: (config, examples in a batch)}."""
    xl: Any = config.load("lit/xl_2_256", [])
    kernels = replace(xl, student=replace(xl.student, implementation="mosaic_gpu"))
    clip: Any = config.load("tinyclip/vit_61m_32", [])
    return {
        "lit/xl_2_256": (xl, 64),
        "lit/xl_2_256, mosaic_gpu": (kernels, 64),
        "DiT-XL/2": (imagenet(dit("xl"), steps=1), 64),
        "tinyclip/vit_61m_32": (clip, 1024),
    }


def made(tree: Any, scale: float = 0.0) -> Any:
    """Arrays in the shapes and shardings of `tree`: zeros, or normal numbers."""
    key = jax.random.key(0)

    def one(x: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = scale * jax.random.normal(key, x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros(x.shape)
        return jax.device_put(drawn.astype(x.dtype), x.sharding)

    return jax.tree.map(one, tree)


def train(name: str, cfg: Any, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step after the first, and what it makes of the device."""
    cfg = replace(cfg, pipeline=replace(cfg.pipeline, batch=batch), mesh=replace(cfg.mesh, fsdp=1))
    mesh = start(cfg.mesh)
    abstract = cfg.abstract(mesh)
    step = replace(abstract.step, frozen=made(abstract.step.frozen, 0.02))
    state = replace(made(abstract.state), params=made(abstract.state.params, 0.02))
    rows = made(abstract.batch, 1.0)
    begun = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, rows))
    compiled = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(repeats):
        state, metrics = step(state, rows)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - begun) / repeats
    peak = peak_flops(jax.devices()[0].device_kind)
    usage = abstract.flops / seconds / (peak * jax.device_count()) if peak else None
    row = {"what": f"train {name}", "batch": batch, "seconds": seconds, "examples_per_second": batch / seconds}
    return row | {"mfu": usage, "first": compiled}


def sample(name: str, cfg: Any, count: int, steps: int) -> dict[str, Any]:
    """Seconds to draw `count` pictures' latents with guidance, weights in bf16, after compilation."""
    mesh = start()
    model = functional(Dit, cfg)
    draw = drawer(model, cfg, SampleConfig("ddim", steps=steps, guidance=4.0), mesh)
    params = {path: x.astype(jnp.bfloat16) for path, x in model.init(jax.random.key(0)).items()}
    labels = np.arange(count) % cfg.classes
    first = time.perf_counter()
    jax.block_until_ready(draw(params, labels, jax.random.key(0)))
    begun = time.perf_counter()
    jax.block_until_ready(draw(params, labels, jax.random.key(1)))
    seconds = time.perf_counter() - begun
    return {"what": f"sample {name}, {steps} steps", "batch": count, "seconds": seconds,
            "examples_per_second": count / seconds, "first": begun - first}  # fmt: skip


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    args = parser.parse_args()
    result = bench.header((), device=jax.devices()[0].device_kind, jax=jax.__version__) | {"rows": []}
    steps = {name: (config.load(name, []), batch) for name, batch in TOY.items()} if args.smoke else recipes()
    work: list[Any] = [(train, (name, *given, 2 if args.smoke else 20)) for name, given in steps.items()]
    for name, cfg in DRAW.items():
        toy = replace(cfg, size=8, width=64, layers=1, heads=2, hidden=64, classes=4)
        work.append((sample, (name, toy, 2, 2) if args.smoke else (name, cfg, 32, 50)))
    for run, given in work:
        try:
            row = run(*given)
        except InputError as reason:  # the kernels are for one kind of GPU
            print(f"{given[0]}: {reason}", flush=True)
            continue
        result["rows"].append(row)
        usage = f", {row['mfu']:.0%} of peak" if row.get("mfu") else ""
        print(
            f"{row['what']:32} batch {row['batch']:5} {row['seconds']:8.3f} s"
            f" {row['examples_per_second']:9.1f}/s{usage}",
            flush=True,
        )
        bench.write(args.json, result, indent=1)


if __name__ == "__main__":
    main()

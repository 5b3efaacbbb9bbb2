"""Linear attention: our implementations, the formula differentiated by JAX, softmax, and PyTorch if installed.

    results=benchmarks/results/linear_attention_cpu.json                                     # two idle CPU cores, 30 s
    python benchmarks/linear_attention.py --tokens 2048 --widths 384 --images 256 1024 4096 --json $results
    python benchmarks/linear_attention.py --tokens 65536 --repeats 50 --json out.json        # the protocol, on a GPU

A row is the median time of a call (calls are queued, and waited for together), with the spread of three rounds, its
ratio to the plain formula differentiated by JAX, the share of the ideal time at the ceilings measured in this run (a
copy, a matmul), the bytes XLA set aside for temporaries, and the relative error of what it computes against float64.
Ideal times count 4 N D min(d, N) operations and 8 bytes a value forward, 12 N D min(d, N) and 24 bytes (28 on a GPU,
which reads once more) with the backward pass. Arrays are as LiT's projections write them for the implementation. Values
have a mean of one standard deviation; three sets of inputs take turns. bfloat16, on a CPU float32. PyTorch runs in this
process, after JAX. Losing rows stay in.
"""

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench
from lit_jax.kernels import PLATFORMS
from lit_jax.linear_attention import Unsupported, linear_attention

SHAPES = ((384, 192), (768, 256), (1152, 288), (1152, 576))  # width, head_dim
TOKENS = (256, 1024, 4096, 16384)  # of one image
SOFTMAX_HEAD = 72
SETS = 3
CPU = jax.default_backend() == "cpu"
DTYPE = jnp.float32 if CPU else jnp.bfloat16


def measure(run: Callable[[Any], Any], sets: list[Any], wait: Callable[[Any], Any], repeats: int) -> dict[str, float]:
    """Median and spread over three rounds of the seconds of one call; the first calls do not count."""
    for i in range(min(10, repeats)):
        out = run(sets[i % SETS])
    wait(out)
    rounds = []
    for _ in range(3):
        started = time.perf_counter()
        for i in range(repeats):
            out = run(sets[i % SETS])
        wait(out)
        rounds.append((time.perf_counter() - started) / repeats)
    return {"seconds": statistics.median(rounds), "spread": (max(rounds) - min(rounds)) / statistics.median(rounds)}


def ceilings(repeats: int) -> dict[str, float]:
    """Bytes/s of a large copy and FLOP/s of a large matmul."""
    n, size = (2**26, 1024) if CPU else (2**30, 8192)
    x, m = jnp.ones(n // 2, jnp.bfloat16), jnp.ones((size, size), DTYPE)
    copied = measure(jax.jit(lambda x: x * jnp.bfloat16(1.5)), [x] * SETS, jax.block_until_ready, repeats)
    multiplied = measure(jax.jit(lambda m: m @ m), [m] * SETS, jax.block_until_ready, repeats)
    return {"bytes": 2 * n / copied["seconds"], "flops": 2 * size**3 / multiplied["seconds"]}


def inputs(batch: int, tokens: int, heads: int, d: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal((batch, tokens, heads, d), np.float32) + (name == "v") for name in "qkvg"}
    return arrays | {
        "weight": rng.standard_normal((5, 5, heads * d), np.float32) / 5,
        "bias": rng.standard_normal(heads * d, np.float32),
    }


def softmax(q: jax.Array, k: jax.Array, v: jax.Array, weight: Any, bias: Any) -> jax.Array:
    """What DiT has: heads of 72, and no branch."""
    shape = (*q.shape[:2], -1, SOFTMAX_HEAD)
    out = jax.nn.dot_product_attention(
        *(x.reshape(shape) for x in (q, k, v)), implementation="cudnn" if jax.default_backend() == "gpu" else "xla"
    )
    return out.reshape(q.shape)


def ours(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, weight: Any, bias: Any) -> jax.Array:
    """On arrays that are `laid_out`; so is the result."""
    turned = implementation == "mosaic_tpu"
    q, k, v = (x.swapaxes(0, 1) if turned else x for x in (q, k, v))
    options: Any = dict(
        conv_weight=weight, conv_bias=bias, implementation=implementation, layout="bhdn" if turned else "bnhd"
    )
    out = linear_attention(q, k, v, **options)
    return out.swapaxes(0, 1) if turned else out


def laid_out(implementation: str, x: Any) -> Any:
    """Lays out [image, token, head, head_dim] as LiT has it: for TPUs [head, image, head_dim, token], else the same."""
    return x.transpose(2, 0, 3, 1) if implementation == "mosaic_tpu" else x


def takes(implementation: str, shape: tuple[int, ...]) -> bool:
    """Whether a kernel for this kind of device is also for this device and head; if not it says why."""
    x = jax.eval_shape(partial(laid_out, implementation), jax.ShapeDtypeStruct(shape, DTYPE))
    try:
        jax.eval_shape(partial(ours, implementation), x, x, x, None, None)
    except Unsupported as reason:
        print(reason)
        return False
    return True


def rows_of_jax(sets: list[dict[str, Any]], branch: bool, repeats: int, scores: bool) -> list[dict[str, Any]]:
    kernel = [
        name for name, where in PLATFORMS.items() if where == jax.default_backend() and takes(name, sets[0]["q"].shape)
    ]
    names: dict[str, Callable[..., Any]] = {
        "plain formula, autodiff": partial(ours, "reference"),
        **{f"ours, {name}": partial(ours, name) for name in ("xla", *kernel)},
    }
    # Softmax over many tokens does not fit a CPU: its scores are heads x tokens x tokens.
    names |= (
        {"softmax": softmax} if scores and sets[0]["q"].shape[2] * sets[0]["q"].shape[3] % SOFTMAX_HEAD == 0 else {}
    )
    order = ("q", "k", "v", "weight", "bias") if branch else ("q", "k", "v")
    rows: list[dict[str, Any]] = []
    for name, attend in names.items():
        how = name.removeprefix("ours, ")
        placed = [
            {n: jnp.asarray(laid_out(how, s[n]), DTYPE) if n in "qkvg" else jnp.asarray(s[n]) for n in s} for s in sets
        ]

        def forward(s: Any, attend: Any = attend) -> Any:
            return attend(*(s[n] for n in order), *[None] * (5 - len(order)))

        def both(s: Any, attend: Any = attend) -> Any:
            out, back = jax.vjp(lambda *x: attend(*x, *[None] * (5 - len(order))), *(s[n] for n in order))
            return out, back(s["g"])

        for direction, run in (("forward", forward), ("forward+backward", both)):
            compiled: Any = jax.jit(run).lower(placed[0]).compile()
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            row = {"name": name, "direction": direction, "temporaries": temporaries} | measure(
                compiled, placed, jax.block_until_ready, repeats
            )
            rows.append(row | ({"error": error(compiled(placed[0]), sets[0], order, how)} if name != "softmax" else {}))
    return rows


def error(found: Any, s: dict[str, Any], order: tuple[str, ...], implementation: str) -> float:
    """Largest relative error of result and q, k, v gradients, first image, against float64 of the rounded inputs."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        one = {n: np.asarray(x[:1].astype(DTYPE) if n in "qkvg" else x, np.float64) for n, x in s.items()}
        attend = partial(ours, "reference")
        out, back = jax.vjp(lambda *x: attend(*x, *[None] * (5 - len(order))), *(jnp.asarray(one[n]) for n in order))
        wanted = [laid_out(implementation, np.asarray(x)) for x in (out, *back(jnp.asarray(one["g"]))[:3])]
    found = [found] if not isinstance(found, tuple) else [found[0], *found[1][:3]]
    first = (slice(None), slice(1)) if implementation == "mosaic_tpu" else slice(1)
    pairs = ((np.asarray(f[first], np.float64), w) for f, w in zip(found, wanted, strict=False))
    return float(max(np.linalg.norm(f - w) / np.linalg.norm(w) for f, w in pairs))


def rows_of_torch(sets: list[dict[str, Any]], branch: bool, repeats: int, scores: bool) -> list[dict[str, Any]]:
    import torch
    from torch.nn import functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    placed = [{n: torch.tensor(x, device=device, dtype=dtype) for n, x in s.items()} for s in sets]
    batch, tokens, heads, d = placed[0]["q"].shape
    side = round(tokens**0.5)

    def linear(q: Any, k: Any, v: Any, weight: Any, bias: Any) -> Any:
        """The module as papers write it: means, not centred."""
        q, k, heads_first = (x.transpose(1, 2) for x in (F.relu(q) + 1e-6, F.relu(k) + 1e-6, v))
        z = 1 / (q @ k.mean(2, keepdim=True).transpose(2, 3) + 1e-6)
        out = (q @ (k.transpose(2, 3) / tokens @ heads_first) * z).transpose(1, 2)
        if branch:
            images = v.reshape(batch, side, side, heads * d).permute(0, 3, 1, 2)
            image = F.conv2d(images, weight.permute(2, 0, 1)[:, None], bias, padding=2, groups=heads * d)
            out = out + image.permute(0, 2, 3, 1).reshape(out.shape)
        return out

    def sdpa(q: Any, k: Any, v: Any, weight: Any, bias: Any) -> Any:
        shape = (batch, tokens, -1, SOFTMAX_HEAD)
        out = F.scaled_dot_product_attention(*(x.reshape(shape).transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).reshape(q.shape)

    rows = []
    names: dict[str, Any] = {"PyTorch, eager": linear}
    if device == "cuda":
        names["torch.compile"] = torch.compile(linear, mode="max-autotune-no-cudagraphs")
    if scores and heads * d % SOFTMAX_HEAD == 0:
        names["PyTorch, SDPA"] = sdpa
    arguments = ("q", "k", "v", "weight", "bias")

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for name, attend in names.items():

        def forward(s: Any, attend: Any = attend) -> Any:
            with torch.no_grad():
                return attend(*(s[n] for n in arguments))

        def both(s: Any, attend: Any = attend) -> Any:
            given = [s[n].requires_grad_() for n in arguments]
            used = given if branch and attend is not sdpa else given[:3]
            return torch.autograd.grad(attend(*given), used, s["g"])

        for direction, run in (("forward", forward), ("forward+backward", both)):
            rows.append({"name": name, "direction": direction} | measure(run, placed, wait, repeats))
    return rows


def ideal(direction: str, images: int, n: int, width: int, d: int, ceiling: dict[str, float]) -> float:
    """Seconds at the ceilings: the larger of arithmetic and traffic."""
    operations, per_value = (4, 8) if direction == "forward" else (12, 28 if jax.default_backend() == "gpu" else 24)
    values = images * n * width
    return max(
        operations * values * min(d, n) / ceiling["flops"], per_value * (2 if CPU else 1) * values / ceiling["bytes"]
    )


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096 if CPU else 65536, help="tokens of all images together")
    parser.add_argument("--repeats", type=int, default=3 if CPU else 50)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 1152] if CPU else sorted({w for w, _ in SHAPES}))
    parser.add_argument(
        "--images", type=int, nargs="+", default=[256, 1024, 4096] if CPU else list(TOKENS), help="tokens of one image"
    )
    args = parser.parse_args()

    limits = ceilings(args.repeats)
    device = jax.devices()[0].device_kind
    print(f"{device}: copy {limits['bytes'] / 1e9:,.0f} GB/s, matmul {limits['flops'] / 1e12:,.2f} TFLOP/s")
    result = bench.header(("jax", "jaxlib", "torch"), machine=platform.platform(), device=device)
    result |= {"ceilings": limits, "dtype": jnp.dtype(DTYPE).name}
    result |= {name: getattr(args, name) for name in ("tokens", "repeats", "widths", "images")} | {"rows": []}
    for width, d in SHAPES:
        if width not in args.widths:
            continue
        for n in args.images:
            for branch in (False, True):
                images = max(1, args.tokens // n)
                sets = [inputs(images, n, width // d, d, seed) for seed in range(SETS)]
                scores = not CPU or n <= 1024
                rows = rows_of_jax(sets, branch, args.repeats, scores)
                if find_spec("torch"):
                    rows += rows_of_torch(sets, branch, args.repeats, scores)
                plain = {row["direction"]: row["seconds"] for row in rows if row["name"].startswith("plain")}
                for row in rows:
                    row["ratio"] = plain[row["direction"]] / row["seconds"]
                    row["of_ideal"] = ideal(row["direction"], images, n, width, d, limits) / row["seconds"]
                    row |= {"width": width, "head_dim": d, "image": n, "images": images, "branch": branch}
                    where = (
                        f"{width}/{d} {images} x"
                        f" {n:<6,}{'branch' if branch else '':7}{row['direction']:17}{row['name']:24}"
                    )
                    figures = (
                        f"{1e3 * row['seconds']:10.3f} ms ±{row['spread']:4.0%} {row['of_ideal']:5.0%} of ideal"
                        f" {row['ratio']:6.2f}x"
                    )
                    memory = f"  {row['temporaries'] / 2**20:8,.0f} MiB" if "temporaries" in row else ""
                    print(
                        where + figures + memory + (f"  error {row['error']:.1e}" if "error" in row else ""), flush=True
                    )
                result["rows"] += rows
                bench.write(args.json, result, indent=1)


if __name__ == "__main__":
    main()

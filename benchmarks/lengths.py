"""Time and memory of attention by the number of tokens: LiT's, with its branch, and DiT's softmax.

    python benchmarks/lengths.py --json benchmarks/results/lengths_cpu.json --png docs/lengths.png

One picture, the width of an XL model (1,152): two linear heads of 576 with a depthwise window of 5 x 5, or 16 softmax
heads of 72 by `common.nn.attention.softmax` (in blocks on CPUs, cuDNN's kernel on GPUs). Both forms take turns, forward
and with gradients; a time is the median of the rounds after one that compiles. Memory is what the compiled program
takes for itself beside arguments and results. float32 on CPUs, else bfloat16. A row is written when it is done.
All take six minutes of two idle cores.
"""

import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench
from heirloom.common.nn.attention import softmax
from lit_jax.linear_attention import linear_attention

TOKENS = (256, 1024, 4096, 16384)
HEADS = {"linear": (2, 576), "softmax": (16, 72)}
WINDOW = 5
CPU = jax.default_backend() == "cpu"
DTYPE = jnp.float32 if CPU else jnp.bfloat16
BUDGET, LEAST, MOST = 10.0, 3, 30  # seconds of a row, and its rounds
COLOURS = {"linear": "#c8553d", "softmax": "#588b8b"}


def programs(tokens: int, gradient: bool) -> dict[str, tuple[Any, tuple[jax.Array, ...]]]:
    """Compiled programs and their arguments."""
    rng, found = np.random.default_rng(0), {}
    weight, bias = (rng.standard_normal(shape, np.float32) / WINDOW for shape in ((WINDOW, WINDOW, 1152), (1152,)))
    attend: dict[str, Any] = {
        "linear": partial(linear_attention, conv_weight=jnp.asarray(weight), conv_bias=jnp.asarray(bias)),
        "softmax": softmax(kernel="xla" if CPU else "cudnn"),
    }
    for name, (heads, head_dim) in HEADS.items():
        shape = (1, tokens, heads, head_dim)
        q, k, v, up = (jnp.asarray(rng.standard_normal(shape, np.float32), DTYPE) for _ in range(4))

        def both(q: Any, k: Any, v: Any, up: Any, attend: Any = attend[name]) -> Any:
            out, back = jax.vjp(attend, q, k, v)
            return out, back(up)

        given: tuple[jax.Array, ...] = (q, k, v, up) if gradient else (q, k, v)
        found[name] = jax.jit(both if gradient else attend[name]).lower(*given).compile(), given
    return found


def measured(tokens: int, gradient: bool) -> list[dict[str, Any]]:
    found = programs(tokens, gradient)
    runs = {name: partial(program, *given) for name, (program, given) in found.items()}
    first = sum(bench.timed(run, 1)[0] for run in runs.values())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(LEAST, min(MOST, int(BUDGET / first)))):
        for name, run in runs.items():
            time.sleep(0.02)
            seconds[name] += bench.timed(run, 1)
    return [
        {"form": name, "tokens": tokens, "gradient": gradient, "seconds": median(seconds[name]),
         "temporaries": program.memory_analysis().temp_size_in_bytes}
        for name, (program, _) in found.items()
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Milliseconds and MiB, linear / softmax, and how many times as long softmax takes."""
    lines = []
    for (tokens, gradient), found in bench.groups(rows, "tokens", "gradient").items():
        linear, quadratic = (next(row for row in found if row["form"] == name) for name in HEADS)
        times = f"{1e3 * linear['seconds']:.3g} / {1e3 * quadratic['seconds']:.3g}"
        memory = f"{linear['temporaries'] / 2**20:,.0f} / {quadratic['temporaries'] / 2**20:,.0f}"
        what = "with gradients" if gradient else "forward"
        lines.append([f"{tokens:,}", what, times, f"{quadratic['seconds'] / linear['seconds']:.1f}", memory])
    return bench.markdown(["tokens", "", "ms, linear / softmax", "times", "MiB, linear / softmax"], lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
    titles = {"seconds": ("ms, with gradients", 1e3), "temporaries": ("MiB of memory, with gradients", 2**-20)}
    for axes, (what, (title, unit)) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, colour in COLOURS.items():
            mine = [row for row in rows if row["form"] == name and row["gradient"]]
            values = [unit * row[what] for row in mine]
            axes.plot([row["tokens"] for row in mine], values, color=colour, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title, xticks=TOKENS)
        axes.set_xticklabels([f"{n:,}" for n in TOKENS])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--png", type=Path, help="a drawing of the rows with gradients")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        for gradient in (False, True):
            rows += measured(tokens, gradient)
            print(rows[-2:], flush=True)
            bench.write(args.json, bench.header() | {"dtype": DTYPE.__name__, "rows": rows})
    print("\n".join(table(rows)))
    if args.png:
        plot(rows, args.png)


if __name__ == "__main__":
    main()

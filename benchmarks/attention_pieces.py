"""Softmax attention on CPUs, taken apart: products and exponentials alone in XLA, next to the whole of both libraries.

    python benchmarks/attention_pieces.py --json benchmarks/results/attention_pieces.json

One picture at the width of an XL model, 16 heads of 72 channels, float32, on idle cores. The products are those of the
rows of side_by_side.py, one head after another as in `common/nn/blockwise.py`: two forward, and five more backward. The
exponentials are those of all scores, with their maxima and sums. All take turns; the results are medians of seconds.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks import bench
from benchmarks.pairs import attend, drawn

HEADS, HEAD = 16, 72
PAUSE = 0.05  # seconds between calls, in which the threads of the last one stop spinning
BUDGET = 10.0  # seconds of a row


def xla_products(q: jax.Array, k: jax.Array, v: jax.Array, gradient: bool) -> Any:
    """The products of attention for each head; arguments as [head, token, channel]."""

    def of_head(head: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        q, k, v = head
        scores = q @ k.T
        if not gradient:
            return scores @ v
        again = (2 * q) @ k.T  # not the same product: XLA would compute it once
        dweights = v @ v.T
        return scores @ v, again.T @ v, dweights @ k, dweights.T @ q

    return jax.lax.map(of_head, (q, k, v))


def torch_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gradient: bool) -> Any:
    found: list[Any] = []
    for q1, k1, v1 in zip(q, k, v, strict=True):
        scores = q1 @ k1.T
        if not gradient:
            found.append((scores @ v1,))
            continue
        again, dweights = (2 * q1) @ k1.T, v1 @ v1.T
        found.append((scores @ v1, again.T @ v1, dweights @ k1, dweights.T @ q1))
    return found


def exponentials(q: jax.Array, k: jax.Array) -> Any:
    """The products of queries and keys, and the softmax but for its division."""

    def of_head(head: tuple[jax.Array, jax.Array]) -> Any:
        scores = head[0] @ head[1].T
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        return weights.sum(-1), weights[:, :HEAD]

    return jax.lax.map(of_head, (q, k))


def scores_alone(q: jax.Array, k: jax.Array) -> Any:
    return jax.lax.map(lambda head: (head[0] @ head[1].T)[:, :HEAD], (q, k))


def calls(tokens: int, gradient: bool) -> dict[str, Callable[[], Any]]:
    pair = attend(tokens, gradient, smoke=False)
    arrays = [drawn(HEADS, tokens, HEAD, seed=seed) for seed in range(3)]
    ours, theirs = [jnp.asarray(x) for x in arrays], [torch.from_numpy(x) for x in arrays]
    products = jax.jit(xla_products, static_argnums=3)
    softmax, scores = jax.jit(exponentials), jax.jit(scores_alone)
    found = {
        "heirloom": pair.ours,
        "torch": pair.theirs,
        "products in XLA": lambda: products(ours[0], ours[1], ours[2], gradient),
        "products in torch": lambda: torch_products(theirs[0], theirs[1], theirs[2], gradient),
    }
    if not gradient:
        found["scores in XLA"] = lambda: scores(*ours[:2])
        found["scores and exponentials in XLA"] = lambda: softmax(*ours[:2])
    return found


def measure(tokens: int, gradient: bool) -> dict[str, Any]:
    runs = calls(tokens, gradient)
    first = sum(bench.timed(run, 2)[1] for run in runs.values())
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(5, min(40, int(BUDGET / first)))):
        for name, run in runs.items():
            time.sleep(PAUSE)
            found[name] += bench.timed(run, 1)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    args = parser.parse_args()
    rows = []
    for tokens in args.tokens:
        for gradient in (False, True):
            rows.append({"tokens": tokens, "gradient": gradient, "seconds": measure(tokens, gradient)})
            print(rows[-1], flush=True)
    packages = ("jax", "jaxlib", "torch")
    bench.write(args.json, bench.header(packages) | {"cores": len(os.sched_getaffinity(0)), "rows": rows})


if __name__ == "__main__":
    main()

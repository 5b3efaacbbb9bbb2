"""Exploring the weights of a language model trained here, beside noise of the same norm at the same budget.

    python benchmarks/language_model.py --json benchmarks/results/language_model.json       # not yet run at this size

A GPT-2-shaped model (4 layers, width 128) is trained on Python's language reference. Its matrices are ranked by Spectrum's
signal-to-noise ratio; the best quarter of each kind is searched greedily with two proposals: latents drawn around the tensor's own, and
Gaussian noise of the same norm. Both get the same number of trials, on the selection questions; what is reported is the test
questions, other text. Soups of what was accepted and the midpoint to the base follow. Each seed is saved when it is done, and a run
that is stopped goes on with the next.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from common.nn.functional import functional
from weightgen import llm
from weightgen.gpt import Gpt, GptConfig, reference_text, scorer, train, word_choice


@dataclass(frozen=True)
class Size:
    model: GptConfig
    steps: int
    questions: int
    candidates: int
    share: float = 0.25


SIZES = {
    "smoke": Size(GptConfig(vocab=512, context=16, width=32, layers=2, heads=2), steps=10, questions=50, candidates=2),
    "cpu": Size(GptConfig(), steps=1000, questions=500, candidates=8),
}
STEP = 0.05  # norm of a proposal over the tensor's, for all of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    size, rows = SIZES[args.size], []
    if args.json and args.json.exists():
        rows = [row for row in json.loads(args.json.read_text())["rows"] if row["seed"] in args.seeds]
    for seed in args.seeds:
        if any(row["seed"] == seed for row in rows):
            continue
        rows += explore(size, seed)
        if args.json:
            made = {
                "date": date.today().isoformat(),
                "machine": f"CPU, {platform.machine()}",
                "versions": {n: version(n) for n in ("jax", "flax")},
            }
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(made | {"size": asdict(size), "rows": rows}, indent=2) + "\n")
    print(f"\n{'':<44}{'select':>10}{'test':>10}   (share of right words, mean over seeds)")
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        print(f"{name:<44}{np.mean([r['select'] for r in mine]):>10.3f}{np.mean([r['test'] for r in mine]):>10.3f}")


def explore(size: Size, seed: int) -> list[dict[str, Any]]:
    begun, text = time.perf_counter(), reference_text(size.model.vocab)
    model = functional(Gpt, size.model)
    base = {k: np.asarray(v) for k, v in train(model, size.model, text.train, size.steps, seed=seed).items()}
    select = scorer(model, word_choice(text.select, size.model, size.questions, seed=seed))
    test = scorer(model, word_choice(text.test, size.model, 4 * size.questions, seed=seed))
    tensors = llm.unstacked(base)
    names = [entry.name for entry in llm.top(llm.rank(tensors), size.share)]
    proposals = {
        "generated rows": llm.matched(llm.row_proposal({n: tensors[n] for n in names}, latent=size.model.width // 2), STEP),
        "noise of matched norm": llm.noise_proposal(STEP),
    }
    rows: list[dict[str, Any]] = []

    def add(arm: str, params: Any, **more: Any) -> None:
        rows.append({"arm": arm, "seed": seed, "select": select(params), "test": test(params)} | more)
        print(rows[-1], flush=True)

    add("base", base, tensors=len(names))
    for arm, propose in proposals.items():
        # Before any selection: what a proposal does to the model by itself.
        rng, moved = np.random.default_rng(seed), base
        for name in names:
            moved = llm.with_tensor(moved, name, propose(name, tensors[name], rng))
        add(f"{arm}, all tensors, one draw", moved)
        found = llm.greedy(base, names, propose, select, size.candidates, seed)
        add(f"{arm}, greedy", found.params, trials=found.trials, kept=len(found.accepted))
        add(f"{arm}, soup of what was kept", llm.soup([base, *found.accepted]))
        add(f"{arm}, midway to the base", llm.interpolate(base, found.params, 0.5), seconds=round(time.perf_counter() - begun, 1))
    return rows


if __name__ == "__main__":
    main()

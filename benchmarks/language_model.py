"""The weights of a language model trained here, explored and adapted, beside noise of the same norm at the same budget.

    python benchmarks/language_model.py --json benchmarks/results/language_model.json       # 25 minutes of one CPU core

A GPT-2-shaped model (4 layers, width 128) is trained on Python's language reference. Its matrices are ranked by
Spectrum's signal-to-noise ratio; the best quarter of each kind is searched greedily with three proposals of one norm:
rows noised and denoised by a diffusion generator of the rows of these tensors (diffused rows), Gaussian latents around
the tensor's own in the rows' principal components (PCA rows), and Gaussian noise. All get the same number of trials, on
the selection questions; what is reported is the test questions, other text. Soups of what was accepted and the midpoint
to the base follow.

Then low-rank adapters: one for each module of the standard library, in one gauge, is a zoo; a generator that is told
five windows of a module (the base model's mean hidden state) draws adapters for modules no adapter of the zoo saw.
Beside it are noise around the zoo's mean with as many draws, of the same distance from the mean, and training on the
five windows themselves for the number of steps that is best for modules of the zoo. All are scored by word choice on
other parts of the module. Each seed is saved when it is done, and a run that is stopped goes on with the next.
"""

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import bench
from benchmarks.weightgen.gpt import (
    Gpt,
    GptConfig,
    adapted,
    fresh_adapter,
    last_logits,
    module_texts,
    reference_text,
    scorer,
    train,
    train_adapters,
    windows_of,
    word_choice,
)
from heirloom.common.nn.functional import Functional, functional
from weightgen import search
from weightgen.baselines import nearest_model, noisy
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.generator.in_memory import Trained, train_generator
from weightgen.generator.sample import SampleConfig
from weightgen.metrics import Estimate, nearest_distance
from weightgen.ranking import rank, top, unstacked
from weightgen.tokens import chunks, one_chunk
from weightgen.train import OPTIMIZER, LoopConfig
from weightgen.zoo.data import Bank, Projection
from weightgen.zoo.lora import canonical_tensors
from weightgen.zoo.zoo import Zoo, flat


@dataclass(frozen=True)
class Size:
    model: GptConfig
    steps: int
    questions: int
    candidates: int
    adapter_steps: int
    generator_steps: int
    """Of the generator of adapters, and of that of rows."""
    modules: int
    """At most, seen and unseen."""
    unseen: int
    adapter_questions: int
    """Of each module, to select by and to test on."""
    share: float = 0.25


SIZES = {
    "smoke": Size(GptConfig(vocab=512, context=16, width=32, layers=2, heads=2), 10, 50, 2, 3, 3, 10, 3, 50),
    "cpu": Size(GptConfig(vocab=1024, context=32), 600, 1000, 8, 200, 500, 110, 20, 400),
}
RANK, RATE, SHOTS, SAMPLES = 4, 2e-2, 5, 8  # of adapters; of their training; windows told; draws
# steps on the told windows to choose from, on so many modules of the zoo
STOPS, STOPPED_ON = (10, 25, 50, 100, 200), 15
DENOISER = DenoiserConfig(width=64, layers=2, heads=4, hidden=128)
ROW_DENOISER = DenoiserConfig(width=128, layers=2, heads=4, hidden=256)
STEP = 0.2  # norm of a proposal over the tensor's, for all of them
STRENGTH = 0.3  # of the noise rows are given before they are denoised: of their latents' variance 0.4 stays


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    args = parser.parse_args()
    size, rows = SIZES[args.size], []
    if args.json and args.json.exists():
        stored = json.loads(args.json.read_text())
        if stored["size"] != asdict(size):
            parser.error(f"{args.json} is of another size: name another file, or remove it")
        rows = stored["rows"]
    for seed in args.seeds:
        if any(row["seed"] == seed for row in rows):
            continue
        rows += explore(size, seed)
        bench.write(args.json, bench.header(("jax", "flax"), machine=bench.CPU) | {"size": asdict(size), "rows": rows})
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    parts = ("select", "test")
    found = [
        [name, *(bench.cell([100 * row[part] for row in mine if part in row]) for part in parts)]
        for name, mine in bench.groups(rows, "arm").items()
    ]
    return "\n" + "\n".join(bench.markdown(("share of right words, %, mean and deviation over seeds", *parts), found))


def explore(size: Size, seed: int) -> list[dict[str, Any]]:
    begun, text = time.process_time(), reference_text(size.model.vocab)
    model = functional(Gpt, size.model)
    base = {k: np.asarray(v) for k, v in train(model, size.model, text.train, steps=size.steps, seed=seed).items()}
    last = last_logits(model)
    select = scorer(last, word_choice(text.select, size.model, size.questions, seed=seed))
    test = scorer(last, word_choice(text.test, size.model, 4 * size.questions, seed=seed))
    tensors = unstacked(base)
    names = [entry.name for entry in top(rank(tensors), size.share)]
    proposals = {
        "diffused rows": search.matched(diffused({n: tensors[n] for n in names}, size, seed), STEP),
        "PCA rows": search.matched(
            search.row_proposal({n: tensors[n] for n in names}, latent=size.model.width // 2), STEP
        ),
        "noise of matched norm": search.noise_proposal(STEP),
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
            moved = search.with_tensor(moved, name, propose(name, tensors[name], rng))
        add(f"{arm}, all tensors, one draw", moved)
        found = search.greedy(base, names, propose, select, size.candidates, seed)
        add(f"{arm}, greedy", found.params, trials=found.trials, kept=len(found.accepted))
        add(f"{arm}, soup of what was kept", search.soup([base, *found.accepted]))
        add(
            f"{arm}, midway to the base",
            search.interpolate(base, found.params, 0.5),
            seconds=round(time.process_time() - begun, 1),
        )
    rows += [row | {"seed": seed} for row in adapt(size, model, base, seed)]
    rows[-1]["seconds"] = round(time.process_time() - begun, 1)
    return rows


def small_generator(cfg: GeneratorConfig, zoo: Zoo, bank: Bank, steps: int, seed: int) -> Trained:
    """A generator of a zoo."""
    loop = LoopConfig(steps=steps, batch=min(64, len(zoo)), optim=replace(OPTIMIZER, warmup=steps // 10), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        return train_generator(cfg, zoo, bank, loop=loop, directory=Path(folder) / "run")


def diffused(tensors: dict[str, np.ndarray], size: Size, seed: int) -> search.Propose:
    """Layer-wise generation: a diffusion generator of all rows of these tensors, conditioned on the tensor."""
    whole = chunks(tensors, size.model.width)
    rows, cut, names = whole.flatten(tensors), one_chunk(whole), [piece.path for piece in whole.pieces]
    classes = np.repeat(np.arange(len(names), dtype=np.int32), [piece.rows for piece in whole.pieces])[:, None]
    zoo = Zoo(weights=rows, quality=np.full(len(rows), np.nan, np.float32), classes=classes, net=None, spec=cut)
    cfg = GeneratorConfig(
        net=None,
        latent=size.model.width // 2,
        condition="label",
        shots=1,
        prior="none",
        denoiser=ROW_DENOISER,
        told=1,
        cut=cut,
        labels=len(names),
    )
    generator = replace(
        small_generator(cfg, zoo, Bank.numbers(names), size.generator_steps, seed),
        how=SampleConfig(steps=50, strength=STRENGTH),
    )
    around = jax.jit(lambda x, s, m: generator.apply(generator.apply(x, s, m, method="encode"), s, m, method="decode"))

    def propose(name: str, tensor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        own = np.asarray(tensor, np.float32).reshape(-1, 1, size.model.width)
        condition, mask = np.full((len(own), 1, 1, 1), names.index(name), np.float32), np.ones((len(own), 1, 1), bool)
        drawn = generator.draw(condition, mask, jax.random.key(int(rng.integers(2**31))), np.arange(len(own)), own)
        # What the latents do not hold stays the tensor's own.
        return (tensor + np.asarray(drawn - around(own, condition, mask)).reshape(tensor.shape)).astype(tensor.dtype)

    return propose


def adapt(size: Size, model: Functional, base: Any, seed: int) -> list[dict[str, Any]]:
    """Adapters for unseen modules, by every way there is; accuracies are means over modules."""
    cfg, rng, key = size.model, np.random.default_rng([seed, 1]), jax.random.key(seed)
    texts = module_texts(cfg.vocab)
    names = [sorted(texts)[i] for i in rng.permutation(len(texts))][: size.modules]
    seen, unseen = names[size.unseen :], names[: size.unseen]
    time_ = cfg.context + 1

    def fit(parts: list[np.ndarray]) -> Any:
        windows = np.stack([windows_of(part, time_, (size.adapter_steps, 8), rng=rng) for part in parts])
        return {
            path: np.asarray(x)
            for path, x in train_adapters(
                model, cfg, base, windows=windows, begin=fresh_adapter(cfg, RANK, key), lr=RATE
            ).items()
        }

    def one(population: Any, i: int) -> dict[str, np.ndarray]:
        return canonical_tensors({path: x[i] for path, x in population.items()})

    def fit_told(names: list[str], steps: int) -> list[dict[str, np.ndarray]]:
        told = np.stack([windows[name][:SHOTS] for name in names])
        found = train_adapters(
            model, cfg, base, windows=np.repeat(told[:, None], steps, 1), begin=fresh_adapter(cfg, RANK, key), lr=RATE
        )
        return [{path: np.asarray(x[i]) for path, x in found.items()} for i in range(len(names))]

    # The zoo: adapters in one gauge, end to end, and what the base model makes of windows of each module.
    trained = fit([texts[name].train for name in seen])
    members = [one(trained, i) for i in range(len(seen))]
    spec = chunks(members[0])
    weights = np.stack([flat(spec, spec.flatten(m)) for m in members])
    classes = np.arange(len(seen), dtype=np.int32)[:, None]
    zoo = Zoo(weights=weights, quality=np.full(len(members), np.nan, np.float32), classes=classes, net=None, spec=spec)
    hidden = jax.jit(lambda tokens: model.apply(base, tokens, method="hidden").mean(1))
    windows = {name: windows_of(texts[name].train, time_, (40,), rng=rng) for name in names}
    looked = {name: np.asarray(hidden(windows[name][:, :-1])) for name in names}
    project = Projection.fit("base", np.concatenate([looked[name] for name in seen]), min(24, cfg.width))
    bank = Bank.of(project(np.concatenate([looked[n] for n in seen])), np.repeat(np.arange(len(seen)), 40), seen)
    told = np.stack([project(looked[name][:SHOTS]) for name in unseen])[:, None]

    gen_cfg = GeneratorConfig(
        net=None,
        latent=min(48, len(members) - 1),
        condition="per_class",
        shots=SHOTS,
        prior="linear",
        denoiser=DENOISER,
        told=bank.features.shape[1],
        cut=spec,
    )
    generator = replace(small_generator(gen_cfg, zoo, bank, size.generator_steps, seed), how=SampleConfig(steps=20))
    mask, n = np.ones((len(unseen), 1, SHOTS), bool), len(unseen)

    def sample(i: int, told: np.ndarray = told) -> np.ndarray:
        return generator.draw(told, mask, key, np.arange(n) + i * n)

    samples = np.stack([sample(i) for i in range(SAMPLES)])
    tokens, condition = zoo.tokens(slice(None)), told[:, 0].mean(1)
    centres = np.stack([bank.features[40 * c : 40 * c + 40].mean(0) for c in classes[:, 0]])
    near = nearest_model(condition, centres, tokens)
    whole = fit([texts[name].train for name in unseen])
    mean = tokens.mean(0)
    noise = rng.standard_normal(samples.shape)
    # As far from the mean as the draws they stand beside.
    far = np.linalg.norm((samples - mean).reshape(SAMPLES, n, -1), axis=2) / np.linalg.norm(
        noise.reshape(SAMPLES, n, -1), axis=2
    )
    noises = mean + far[..., None, None] * noise
    expected = np.asarray(generator.apply(told, mask, method="expected"))
    last = last_logits(model)

    def questions(names: list[str], part: str) -> list[search.Score]:
        return [
            scorer(last, word_choice(getattr(texts[name], part), cfg, size.adapter_questions, seed=seed))
            for name in names
        ]

    # A stopping rule that looks at no module it is used on.
    on = seen[:STOPPED_ON]
    rules = {
        steps: np.mean(
            [score(adapted(base, a)) for score, a in zip(questions(on, "select"), fit_told(on, steps), strict=True)]
        )
        for steps in STOPS
    }
    stop = max(rules, key=rules.__getitem__)
    scores = {part: questions(unseen, part) for part in ("select", "test")}

    def judge(tokens: np.ndarray, part: str) -> np.ndarray:
        return np.array(
            [score(adapted(base, spec.unflatten(t, spec.like))) for score, t in zip(scores[part], tokens, strict=True)]
        )

    arms = {
        "no adapter": np.zeros_like(near),
        "zoo mean": np.broadcast_to(mean, near.shape),
        "zoo mean + noise of matched norm": noises[0],
        "nearest zoo adapter": near,
        "ridge": expected,
        "generated, single sample": samples[0],
        "generated, 8 averaged": samples.mean(0),
        "generated, told another module": sample(0, np.roll(told, 1, axis=0)),
        "trained on the five windows": np.stack([spec.flatten(adapter) for adapter in fit_told(unseen, stop)]),
        "trained on half the module": np.stack([spec.flatten(one(whole, i)) for i in range(n)]),
    }
    rows: list[dict[str, Any]] = []
    found = {name: judge(tokens, "test") for name, tokens in arms.items()}
    for name, draws in {"zoo mean + noise of matched norm": noises, "generated": samples}.items():
        by_select, by_test = (np.stack([judge(s, part) for s in draws]) for part in ("select", "test"))
        found[f"{name}, best of {SAMPLES} by selection set"] = by_test[by_select.argmax(0), np.arange(n)]
        found[f"{name}, best of {SAMPLES} by test (oracle)"] = by_test.max(0)
    for name, values in found.items():
        gap = Estimate.of(values - found["zoo mean"])
        rows.append(
            {"arm": f"adapter: {name}", "test": float(values.mean()), "over zoo mean": gap.mean, "ci95": gap.half}
        )
        print(rows[-1], flush=True)
    drawn = flat(spec, samples[0])
    rows[0] |= {
        "modules": [len(seen), len(unseen)],
        "weights": spec.count,
        "distance": {
            "generated": float(np.median(nearest_distance(drawn, weights))),
            "within the zoo": float(np.median(nearest_distance(weights, weights, skip_self=True))),
            "noise": float(np.median(nearest_distance(noisy(weights, 0.04, rng), weights))),
        },
        "spread of samples": float(by_test.std(0).mean()),
        "steps on the five windows": stop,
    }
    return rows


if __name__ == "__main__":
    main()

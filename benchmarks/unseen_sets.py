"""Networks for a data set that no network of the zoo was trained on, from zoos of several data sets together.

    python benchmarks/unseen_sets.py --fashion data/fashion_mnist --cifar data/cifar10 --runs runs/unseen_sets \
        --json benchmarks/results/unseen_sets.json

Five data sets: digits, Fashion-MNIST, CIFAR-10, subgroups of emoji, and outlines of icons. One is left out, a zoo of
5-way networks is trained on the other four together, and a generator on the zoo. It is told 5 pictures of each class of
new tasks: of the data set that was left out, and of those of the zoo. Each data set is left out once. All networks
begin from one shared initialisation, which is the regime where generation works at all (`generated_init.py`).

Every start is judged before a step, fine-tuned on the 5 told pictures alone, and on more. Fine-tuning has the rate of
RATES that is best for this start and number of steps, on tasks of the zoo's data sets that no network was trained on.
Guidance is swept in the same way. Beside starts from the zoo there are a network pretrained on the union of its data
sets, Reptile (Nichol et al. 2018) over its tasks, and the few-shot classifiers without training.

The size `cpu` takes about half an hour of one core; what is finished stays in --runs, and the same command goes on.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench
from benchmarks.weightgen.worlds import (
    SHOTS,
    WAYS,
    Pictures,
    World,
    config,
    generator,
    pictures,
    read,
    sources,
    tasks,
    world,
)
from weightgen import baselines
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.generator.in_memory import Trained
from weightgen.metrics import accuracy, head_accuracy
from weightgen.zoo.fit import FitConfig, Params, build, fit_population, initial_population
from weightgen.zoo.nets import NetConfig, net, predict
from weightgen.zoo.zoo import Zoo, flat, head_tokens

STEPS = {"told": (25,), "more": (5, 25, 100)}  # of fine-tuning: on the told pictures alone, or on more
RATES = (0.003, 0.01, 0.03)
GUIDANCE = (1.0, 2.0, 4.0)
TOLD = {"none": "no prior", "linear": "ridge prior"}  # by GeneratorConfig.prior


@dataclass(frozen=True)
class Size:
    """What a machine can do."""

    members: int
    """Networks of a zoo."""
    fit: FitConfig
    """Of each of them."""
    steps: int
    """Of a generator."""
    pretraining: FitConfig
    rounds: int
    """Of Reptile, each over 20 tasks with ten steps."""
    tasks: int = 20
    samples: int = 32
    pictures: int = 60
    """Of each class: a network's training pictures, and those of a test."""
    most: int = 300
    """Training pictures of a class that are read, and a third as many for tests."""
    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig(width=64, layers=2, heads=4, hidden=128))
    draws: int = 25
    """Steps of the sampler."""


SIZES = {
    "smoke": Size(24, FitConfig(3, 16, lr=0.01), 3, FitConfig(3, 16, lr=0.01), 2, tasks=2, samples=2, pictures=6,
                  most=12, denoiser=DenoiserConfig(width=16, layers=1, heads=2, hidden=16), draws=2),
    "cpu": Size(2000, FitConfig(200, 32, lr=0.01), 1000, FitConfig(5000, 256, lr=0.01), 500),
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What a start may be made of: the zoo, two generators of it, and what was trained on its data sets."""

    zoo: Zoo
    conditions: np.ndarray
    """Mean features of the classes of each network, [member, 5 * feature]."""
    generators: dict[str, Trained]
    ridge: baselines.Ridge
    pretrained: Params
    reptile: Params
    spread: np.ndarray
    """Covariance of features within the zoo's classes."""


def learn(size: Size, world: World, classes: dict[str, range], sets: list[str], seed: int, folder: Path) -> Known:
    """Trains everything that is known before a target task. sets: those of the zoo."""
    rng = np.random.default_rng(seed)
    cfg = config(world, "mlp")
    spec, known = head_tokens(cfg), tasks(classes, sets, size.members, rng)
    x, y = pictures(world, world.train, known, size.pictures, [seed])
    parts = build(cfg, lambda a, b: (x[a:b], y[a:b]), size.members, fit=size.fit, seed=seed)
    weights = np.concatenate([flat(spec, spec.flatten({k: np.asarray(v) for k, v in part.items()})) for part in parts])
    zoo = Zoo(weights=weights, quality=np.zeros(len(known), np.float32), classes=known, net=cfg, spec=spec)
    how: Any = dict(denoiser=size.denoiser, steps=size.steps, batch=64, draws=size.draws, seed=seed)
    generators = {prior: generator(zoo, world.told, prior, **how, folder=folder / prior) for prior in TOLD}
    told = world.told.draw(known, SHOTS, rng).mean(2).reshape(len(known), -1)
    mine = np.concatenate([np.arange(r.start, r.stop) for name, r in classes.items() if name in sets])
    bank = world.train
    inner = np.concatenate([bank.features[a:b] - bank.features[a:b].mean(0) for a, b in zip(
        bank.starts[mine], bank.starts[mine + 1], strict=True)])  # fmt: skip
    return Known(
        zoo=zoo,
        conditions=told,
        generators=generators,
        ridge=baselines.Ridge.fit(told, weights_of(zoo), known[:, 0]),
        pretrained=pretrain(size, world, mine, seed),
        reptile=reptile(size, cfg, x, y, seed),
        spread=inner.T @ inner / len(inner),
    )


def weights_of(zoo: Zoo) -> np.ndarray:
    tokens = zoo.tokens(slice(None))
    return tokens.reshape(len(tokens), -1)


def pretrain(size: Size, world: World, classes: np.ndarray, seed: int) -> Params:
    """One network of the same hidden layer that tells all classes of the zoo's data sets apart."""
    cfg = replace(config(world, "mlp"), classes=len(classes))
    bank = world.train
    x = np.concatenate([bank.features[bank.starts[c] : bank.starts[c + 1]] for c in classes])[None]
    y = np.repeat(np.arange(len(classes)), bank.counts[classes]).astype(np.int32)[None]
    start = initial_population(net(cfg), 1, "shared", key=jax.random.key(seed))
    return {path: leaf[0] for path, leaf in _fitter(size.pretraining, cfg)(start, x, y, jax.random.key(seed)).items()}


def reptile(size: Size, cfg: NetConfig, x: np.ndarray, y: np.ndarray, seed: int) -> Params:
    """An initialisation that moves towards the solutions of the zoo's tasks, by Reptile; x, y: of its networks."""
    rng = np.random.default_rng([seed, 5])
    inner = _fitter(FitConfig(10, 32, lr=0.01), cfg)
    start = initial_population(net(cfg), 1, "shared", key=jax.random.key(seed))
    now = {path: leaf[0] for path, leaf in start.items()}
    for i in range(size.rounds):
        rows = rng.choice(len(x), min(20, len(x)), replace=False)
        population = {path: jnp.broadcast_to(leaf, (len(rows), *leaf.shape)) for path, leaf in now.items()}
        found = inner(population, x[rows], y[rows], jax.random.key(rng.integers(2**31)))
        rate = 1 - i / size.rounds
        now = {path: leaf + rate * (found[path].mean(0) - leaf) for path, leaf in now.items()}
    return now


@cache
def _fitter(fit: FitConfig, cfg: NetConfig) -> Callable[..., Params]:
    return jax.jit(lambda params, x, y, key: fit_population(net(cfg), params, x, y=y, cfg=fit, key=key))


@dataclass(frozen=True)
class Tasks:
    """Tasks to judge on. told: [task, 5, shot, feature]; more, select, test: (x, y) of other pictures each, but `more`
    may hold the told ones.
    """

    classes: np.ndarray
    told: np.ndarray
    more: tuple[np.ndarray, np.ndarray]
    select: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    @classmethod
    def draw(cls, size: Size, world: World, classes: np.ndarray, salt: list[int]) -> "Tasks":
        told = world.told.draw(classes, SHOTS, np.random.default_rng([*salt, 0]))
        more = pictures(world, world.train, classes, size.pictures, [*salt, 1])
        x, y = pictures(world, world.test, classes, size.pictures, [*salt, 2])
        # A class with few pictures repeats them: halves by position would share some.
        select = np.zeros(y.shape, bool)
        for t, way in itertools.product(range(len(classes)), range(WAYS)):
            own = np.flatnonzero(y[t] == way)
            distinct = min(int(world.test.counts[classes[t, way]]), size.pictures)
            select[t, own] = np.arange(len(own)) % distinct < distinct // 3
        return cls(classes, told, more, (x, np.where(select, y, -1)), (x, np.where(select, -1, y)))


def starts(size: Size, known: Known, told: Tasks, guidance: dict[str, float], seed: int) -> dict[str, Params]:
    """Networks for tasks, by where they come from: leaves [task, ...]."""
    zoo, n, rng = known.zoo, len(told.classes), np.random.default_rng([seed, 1])
    assert zoo.net is not None
    model, spec = net(zoo.net), zoo.spec
    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in model.spec.items()}
    condition, tokens = told.told.mean(2).reshape(n, -1), zoo.tokens(slice(None))
    near = baselines.nearest_model(condition, known.conditions, tokens)

    def tree(made: np.ndarray) -> Params:
        return spec.unflatten(jnp.asarray(made, jnp.float32), like)

    found = {
        "random init": initial_population(model, n, "random", key=jax.random.key(seed + 1)),
        "zoo mean": tree(np.broadcast_to(tokens.mean(0), near.shape)),
        "nearest zoo network": tree(near),
        "average of 16 zoo networks": tree(spec.padded(baselines.average(zoo.weights, n, min(16, len(zoo)), rng=rng))),
        "Reptile": {path: jnp.broadcast_to(leaf, (n, *leaf.shape)) for path, leaf in known.reptile.items()},
        "pretrained on the union, new head": transferred(known, told, "zero"),
        "pretrained on the union, head of prototypes": transferred(known, told, "prototype"),
        "ridge": tree(known.ridge(condition).reshape(near.shape)),
    }
    for prior, trained in known.generators.items():
        name = f"generated, {TOLD[prior]}"
        samples = drawn(size, trained, told.told, guidance.get(prior, 1.0), seed)
        x, y = told.select
        score = np.stack([accuracy(labels(zoo.net, tree(one), x), y, WAYS) for one in samples])
        found[name] = tree(samples[0])
        found[f"{name}, {len(samples)} averaged"] = tree(samples.mean(0))
        found[f"{name}, best of {len(samples)} by selection set"] = tree(samples[score.argmax(0), np.arange(n)])
        found[f"{name}, wrong order of classes"] = tree(
            drawn(replace(size, samples=1), trained, np.roll(told.told, 1, axis=1), guidance.get(prior, 1.0), seed)[0]
        )
    return found


def transferred(known: Known, told: Tasks, head: str) -> Params:
    """The pretrained hidden layer for each task, with a head of zeros or of prototypes of its hidden units."""
    n, kept = len(told.classes), {p: v for p, v in known.pretrained.items() if p.startswith("up/")}
    hidden = np.maximum(told.told @ np.asarray(kept["up/kernel"]) + np.asarray(kept["up/bias"]), 0)
    rows = baselines.prototype(hidden) if head == "prototype" else np.zeros((n, WAYS, hidden.shape[-1] + 1))
    new = {"out/kernel": rows[..., :-1].swapaxes(1, 2), "out/bias": rows[..., -1]}
    repeated = {path: jnp.broadcast_to(leaf, (n, *leaf.shape)) for path, leaf in kept.items()}
    return repeated | {path: jnp.asarray(leaf, jnp.float32) for path, leaf in new.items()}


def drawn(size: Size, trained: Trained, told: np.ndarray, guidance: float, seed: int) -> np.ndarray:
    """Samples [sample, task, token, length]."""
    n, mask = len(told), np.ones(told.shape[:3], bool)
    how = replace(trained, how=replace(trained.how, guidance=guidance))
    return np.stack([how.draw(told, mask, jax.random.key(seed), np.arange(n) + i * n) for i in range(size.samples)])


def labels(cfg: NetConfig, params: Params, x: np.ndarray) -> np.ndarray:
    return predict(cfg, params, x)


Scores = dict[str, dict[str, dict[str, float]]]  # by start, column and rate


def judged(cfg: NetConfig, found: dict[str, Params], told: Tasks, seed: int) -> Scores:
    """Accuracy of every start before a step, and after fine-tuning with every rate."""

    def score(params: Params) -> float:
        return float(accuracy(labels(cfg, params, told.test[0]), told.test[1], WAYS).mean())

    n = len(told.classes)
    y = np.broadcast_to(np.repeat(np.arange(WAYS), SHOTS), (n, WAYS * SHOTS)).astype(np.int32)
    data = {"told": (told.told.reshape(n, WAYS * SHOTS, -1), y), "more": told.more}
    table: Scores = {}
    for name, start in found.items():
        table[name] = {"0": {"": score(start)}}
        for kind, budgets in STEPS.items():
            for steps, rate in itertools.product(budgets, RATES):
                fit = FitConfig(steps, 0 if kind == "told" else 32, lr=rate)
                after = _fitter(fit, cfg)(start, *data[kind], jax.random.key(seed))
                table[name].setdefault(f"{kind}, {steps}", {})[f"{rate:g}"] = score(after)
    return table


def chosen(table: Scores, tried: Scores) -> dict[str, dict[str, float]]:
    """Accuracy by start and column, with the rate that is best in `tried`."""

    def best(name: str, column: str) -> str:
        return max(tried[name][column], key=tried[name][column].__getitem__)

    return {
        name: {column: rates[best(name, column)] for column, rates in found.items()} for name, found in table.items()
    }


def untrained(known: Known, told: Tasks) -> dict[str, dict[str, float]]:
    """Few-shot classifiers on the features themselves, which nothing is trained for."""
    found = {
        "prototypes, no network": baselines.prototype(told.told),
        "linear discriminant, no network": baselines.discriminant(told.told, known.spread),
    }
    return {name: {"0": float(head_accuracy(heads, *told.test).mean())} for name, heads in found.items()}


def arm(size: Size, sets: dict[str, Pictures], left_out: str, seed: int, folder: Path) -> dict[str, Any]:
    """One data set left out: accuracies on its tasks and on new ones of the zoo's data sets."""
    everything, classes = world(sets, left_out)
    inside = [name for name in sets if name != left_out]
    known = learn(size, everything, classes, inside, seed, folder)
    assert known.zoo.net is not None
    cfg = known.zoo.net
    rng = np.random.default_rng([seed, 9])
    groups = {"validation": inside, "seen": inside, "unseen": [left_out]}
    drawn = {
        group: Tasks.draw(size, everything, tasks(classes, names, size.tasks, rng), [seed, i])
        for i, (group, names) in enumerate(groups.items())
    }
    guidance, swept = {}, {}
    for prior, name in TOLD.items():
        row = f"generated, {name}, {size.samples} averaged"
        tried = {}
        for g in GUIDANCE:
            some = starts(size, known, drawn["validation"], {prior: g}, seed)
            right = labels(cfg, some[row], drawn["validation"].test[0])
            tried[g] = float(accuracy(right, drawn["validation"].test[1], WAYS).mean())
        guidance[prior], swept[prior] = max(tried, key=tried.__getitem__), tried
    scores = {
        group: judged(cfg, starts(size, known, found, guidance, seed), found, seed) for group, found in drawn.items()
    }
    x, y = pictures(everything, everything.test, known.zoo.classes[:200], size.pictures, [seed, 3])
    own = labels(cfg, tree_of(known.zoo, 200), x)
    return {
        "left out": left_out,
        "seed": seed,
        "zoo": float(accuracy(own, y, WAYS).mean()),
        "guidance": swept,
        **{g: untrained(known, drawn[g]) | chosen(scores[g], scores["validation"]) for g in ("seen", "unseen")},
    }


def tree_of(zoo: Zoo, n: int) -> Params:
    assert zoo.net is not None
    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in net(zoo.net).spec.items()}
    return zoo.spec.unflatten(jnp.asarray(zoo.tokens(slice(0, n)), jnp.float32), like)


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--fashion", default="data/fashion_mnist", help="the folder of scripts/make_fashion_mnist.py")
    parser.add_argument("--cifar", default="data/cifar10", help="the folder of scripts/make_cifar10.py")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--runs", type=Path, required=True, help="where trainings and finished arms are kept")
    args = parser.parse_args()
    size = SIZES[args.size]
    args.runs.mkdir(parents=True, exist_ok=True)
    # The arms compile the same programs; once is enough.
    jax.config.update("jax_compilation_cache_dir", str(args.runs / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    sets = {name: read(source, size.most) for name, source in sources(args.fashion, args.cifar).items()}
    told = {
        name: {"classes": len(found.names), "train": len(found.train[1]), "test": len(found.test[1])}
        for name, found in sets.items()
    }
    print(json.dumps(told), flush=True)
    rows = []
    for seed, left_out in itertools.product(args.seeds, sets):
        run = args.runs / f"{left_out}-{seed}"
        rows.append(bench.once(run.with_name(f"{run.name}.json"), lambda: arm(size, sets, left_out, seed, run)))  # noqa: B023
        print(f"{left_out}, seed {seed}: zoo {100 * rows[-1]['zoo']:.1f} %", flush=True)
        bench.write(args.json, bench.header() | {"size": asdict(size), "sets": told, "rows": rows}, indent=1)
    print("\n".join(report(rows)))


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy in percent by start, means over data sets and seeds; and before a step for each data set left out."""
    lines = []
    for group in ("unseen", "seen"):
        columns, names = list(rows[0][group]["random init"]), list(rows[0][group])
        body = [[name, *(percent([row[group][name].get(c) for row in rows]) for c in columns)] for name in names]
        lines += [*bench.markdown([group, *columns], body), ""]
    by = bench.groups(rows, "left out")
    body = [
        [name, *(percent([row["unseen"][name]["0"] for row in mine]) for mine in by.values())]
        for name in rows[0]["unseen"]
    ]
    return [*lines, *bench.markdown(["left out", *by], body)]


def percent(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{100 * np.mean(found):.1f}" if found else ""


if __name__ == "__main__":
    main()

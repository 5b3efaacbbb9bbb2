"""Generated networks as initialisation, where weights are no convex affair.

    results=benchmarks/results/generated_init_cpu.json
    python benchmarks/generated_init.py --data data/fashion_mnist --runs runs/cpu --json $results
    python benchmarks/generated_init.py --data data/fashion_mnist --runs runs/gpu --size gpu --json gpu.json

--data: the folder of scripts/make_fashion_mnist.py or make_cifar10.py. Zoos of MLPs (64-16-5, on PCA features) and of
the small CNN (2,464 parameters on ten grey classes) are trained on random 5-class subsets, from one shared
initialisation, from random ones, and from random ones with matched neurons. Generators are told 5 pictures of each
class in the task's order: diffusion of all weights, and a ridge map (the prior) with diffusion of what it leaves.
Targets hold the last two classes, which no zoo network has seen together. Networks are judged at 0, 1, 5 and 25 steps
of fine-tuning, beside random, shared and zoo-mean initialisation, the nearest zoo network and it with noise, averages
and densities of the zoo, ridge and a hypernetwork. Every arm of every seed is saved when it is done, and a run that is
stopped goes on with the next; losing rows stay in.

The size `cpu` is cut for one core: 2,000 MLPs or 200 CNNs a zoo, small generators, 20 targets; its 36 arms took 36
minutes of CPU. The size `gpu` has not run yet.
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench
from benchmarks.weightgen import align
from benchmarks.weightgen.worlds import SHOTS, World, config, generator, pictures
from heirloom.common.errors import InputError
from weightgen.baselines import Ridge, average, gaussian, hypernetwork, kde, nearest_model, noisy
from weightgen.codec import Gate
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.metrics import Estimate, accuracy, disagreement, error_overlap, nearest_distance
from weightgen.zoo.data import Bank, Projection
from weightgen.zoo.fit import FitConfig, build, fit_population, initial_population
from weightgen.zoo.nets import NetConfig, net, predict
from weightgen.zoo.zoo import Zoo, flat, head_tokens

BUDGETS = (0, 1, 5, 25)  # steps of fine-tuning
HIDDEN = {"mlp": ("hidden",), "cnn": ("first", "second", "third", "hidden")}  # units that may be permuted


@dataclass(frozen=True)
class Size:
    """What a machine can do."""

    members: dict[str, int]
    pictures: int
    """Of each class, per network."""
    fit: dict[str, FitConfig]
    steps: dict[str, int]
    """Of a generator."""
    tasks: int
    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig(width=64, layers=2, heads=4, hidden=128))
    batch: int = 64
    draws: int = 25
    """Steps of the sampler."""


def _size(
    mlp: int, cnn: int, pictures: int, steps: dict[str, int], batch: int, *rest: Any, at_once: int = 0, **more: Any
) -> Size:
    fits = {kind: FitConfig(n, batch, lr=0.01, at_once=at_once if kind == "cnn" else 0) for kind, n in steps.items()}
    return Size({"mlp": mlp, "cnn": cnn}, pictures, fits, *rest, **more)


SIZES = {
    "smoke": _size(
        20,
        10,
        8,
        {"mlp": 3, "cnn": 3},
        16,
        {"mlp": 3, "cnn": 3},
        2,
        DenoiserConfig(width=16, layers=1, heads=2, hidden=16),
        8,
        at_once=1,
    ),
    "cpu": _size(2000, 200, 100, {"mlp": 200, "cnn": 100}, 32, {"mlp": 500, "cnn": 200}, 20, at_once=1),
    "gpu": _size(
        4000,
        4000,
        500,
        {"mlp": 1000, "cnn": 1000},
        128,
        {"mlp": 20_000, "cnn": 20_000},
        100,
        DenoiserConfig(width=384, layers=8, heads=6, hidden=1536),
        128,
    ),
}
BEGINS = ("shared", "random", "aligned")
TOLD = {"none": "no prior", "linear": "ridge prior"}  # by GeneratorConfig.prior
SAMPLES = 8
ORACLE = f"oracle of {SAMPLES}, by test"
CNN_FEATURES = 64  # of the pictures a CNN's generator is told, by PCA


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    parser.add_argument("--priors", nargs="+", choices=TOLD, default=list(TOLD))
    parser.add_argument("--runs", type=Path, required=True, help="where trainings and finished arms are kept")
    args = parser.parse_args()
    size, rows = SIZES[args.size], []
    digest = sha256(repr(size).encode()).hexdigest()[:8]  # arms of another size are other arms
    args.runs.mkdir(parents=True, exist_ok=True)
    # The arms compile the same programs; once is enough.
    jax.config.update("jax_compilation_cache_dir", str(args.runs / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    for kind in args.kinds:
        world = read(args.data, kind)
        for seed in args.seeds:
            networks = cache(partial(population, size, world, kind, seed))  # the random ones serve two arms
            for begin, prior in itertools.product(BEGINS, args.priors):
                done = args.runs / f"{args.data.name}-{digest}-{kind}-{begin}-{prior}-{seed}.json"
                if not done.exists():
                    found = arm(size, world, kind, begin, prior, seed, networks, args.runs / done.stem)
                    done.write_text(json.dumps(found, indent=2) + "\n")
                rows.append(json.loads(done.read_text()))
                print(tables(rows[-1:]), flush=True)
                bench.write(args.json, bench.header() | {"size": asdict(size), "data": args.data.name, "rows": rows})
    print(tables(rows))


def read(folder: Path, kind: str) -> World:
    """28 x 28 pictures in [-1, 1] for a CNN, 64 PCA features for an MLP."""
    arrays = {}
    for name in ("train/image", "train/label", "test/image", "test/label"):
        if not (folder / f"{name}.npy").is_file():
            raise InputError(
                f"{folder}/{name}.npy is missing: make the folder with scripts/make_fashion_mnist.py or make_cifar10.py"
            )
        arrays[name] = np.load(folder / f"{name}.npy")
    x, t = (arrays[f"{part}/image"] for part in ("train", "test"))
    if x.shape[1] == 32:
        x, t = x[:, 2:30, 2:30], t[:, 2:30, 2:30]
    if (x[:1000] == x[:1000, :, :, :1]).all():
        x, t = x[..., :1], t[..., :1]  # grey
    shape = x.shape[1:]
    x, t = (a.reshape(len(a), -1).astype(np.float32) / 127.5 - 1 for a in (x, t))
    names = [str(c) for c in np.unique(arrays["train/label"])]
    project = Projection.fit("pixels", x[:10_000], CNN_FEATURES)
    y, u = arrays["train/label"], arrays["test/label"]
    told = Bank.of(project(x), y, names)
    if kind == "mlp":
        return World(told, Bank.of(project(t), u, names), told, (CNN_FEATURES,))
    return World(Bank.of(x, y, names), Bank.of(t, u, names), told, shape)


def subsets(size: Size, kind: str, seed: int, names: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of the zoo's networks, [member, 5], and of the targets: only these have both of the last two classes."""
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.permutations(range(names), 5)), np.int32)
    both = np.isin(every, (names - 2, names - 1)).sum(1) == 2
    return (
        every[~both][rng.choice((~both).sum(), size.members[kind])],
        every[both][rng.choice(both.sum(), size.tasks, replace=False)],
    )


def population(
    size: Size, world: World, kind: str, seed: int, begin: Literal["shared", "random"]
) -> dict[str, np.ndarray]:
    """The trained networks of a zoo, leaves [member, ...]."""
    cfg = config(world, kind)
    classes, _ = subsets(size, kind, seed, len(world.train.names))
    parts = build(
        cfg,
        lambda a, b: pictures(world, world.train, classes[a:b], size.pictures, [seed, a]),
        size.members[kind],
        fit=size.fit[kind],
        start=begin,
        chunk=100,
        seed=seed,
    )
    trees = [{path: np.asarray(leaf) for path, leaf in part.items()} for part in parts]
    return {path: np.concatenate([tree[path] for tree in trees]) for path in trees[0]}


def matched(tree: dict[str, np.ndarray], reference: dict[str, np.ndarray], cfg: NetConfig) -> dict[str, np.ndarray]:
    """Each network of a population with its neurons in the order that suits `reference`."""
    groups = align.symmetries(net(cfg).spec, HIDDEN[cfg.kind])
    members = [
        align.align(reference, {k: v[i] for k, v in tree.items()}, groups)
        for i in range(len(next(iter(tree.values()))))
    ]
    return {path: np.stack([member[path] for member in members]) for path in tree}


def arm(
    size: Size,
    world: World,
    kind: str,
    begin: str,
    prior: Any,
    seed: int,
    networks: Callable[[Any], dict[str, np.ndarray]],
    folder: Path,
) -> dict[str, Any]:
    """Zoo, generator and every initialisation, judged on subsets no zoo network saw."""
    clock = [time.process_time()]  # others may use the machine
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        clock.append(time.process_time())
        seconds[name] = round(clock[-1] - clock[-2], 1)

    cfg = config(world, kind)
    model, spec = net(cfg), head_tokens(cfg)
    classes, targets = subsets(size, kind, seed, len(world.train.names))
    tree = networks("shared" if begin == "shared" else "random")
    if begin == "aligned":
        tree = matched(tree, {k: v[0] for k, v in tree.items()}, cfg)
    zoo = Zoo(
        weights=flat(spec, spec.flatten(tree)),
        quality=np.zeros(len(classes), np.float32),
        classes=classes,
        net=cfg,
        spec=spec,
    )
    tokens = zoo.tokens(slice(None))
    lap("zoo")

    # The condition is PCA features for both kinds.
    how: Any = dict(denoiser=size.denoiser, steps=size.steps[kind], batch=size.batch, draws=size.draws, seed=seed)
    trained = generator(zoo, world.told, prior, **how, folder=folder)
    lap("generator")

    rng = np.random.default_rng([seed, 1])
    support = world.told.draw(targets, SHOTS, rng)
    mask, n = np.ones(support.shape[:3], bool), len(targets)
    key = jax.random.key(seed)
    samples = np.stack([trained.draw(support, mask, key, np.arange(n) + i * n) for i in range(SAMPLES)])
    shuffled = trained.draw(np.roll(support, 1, axis=1), mask, key, np.arange(n))
    seen = world.told.draw(classes, SHOTS, rng)
    latents = np.asarray(trained.apply(tokens, seen, np.ones(seen.shape[:3], bool), method="encode"))
    density = kde(latents.reshape(len(latents), -1), n, rng).reshape(n, *latents.shape[1:])
    told = seen.mean(2)
    condition = support.mean(2).reshape(n, -1)
    ridge = Ridge.fit(told.reshape(len(told), -1), tokens.reshape(len(tokens), -1), classes[:, 0])
    hyper = hypernetwork(told.reshape(len(told), -1), tokens.reshape(len(tokens), -1), seed)
    near = nearest_model(condition, told.reshape(len(told), -1), tokens)

    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in model.spec.items()}
    at_once = size.fit[kind].at_once

    def labels(weights: Any, x: np.ndarray) -> np.ndarray:
        return predict(
            cfg,
            weights if isinstance(weights, dict) else spec.unflatten(jnp.asarray(weights, jnp.float32), like),
            x,
            at_once=at_once,
        )

    # Three sets of different pictures: to fine-tune on, to choose a sample by, to test on.
    pool, y = pictures(world, world.train, targets, size.pictures, [seed, 2])
    held = np.tile(np.arange(size.pictures) >= 0.8 * size.pictures, 5)
    (x, y), select = (pool[:, ~held], y[:, ~held]), (pool[:, held], y[:, held])
    xt, yt = pictures(world, world.test, targets, min(size.pictures, 50), [seed, 3])
    by_select = np.stack([accuracy(labels(sample, select[0]), select[1], 5) for sample in samples])
    predicted = np.stack([labels(sample, xt) for sample in samples])
    by_test = np.stack([accuracy(found, yt, 5) for found in predicted])

    starts: dict[str, Any] = {
        "random init": initial_population(model, n, "random", key=jax.random.key(seed + 1)),
        "the zoo's own init": initial_population(model, n, "shared", key=jax.random.key(seed)),
        "zoo mean": np.broadcast_to(tokens.mean(0), near.shape),
        "random zoo network": tokens[rng.integers(len(tokens), size=n)],
        "nearest zoo network": near,
        "nearest zoo network + 0.06 noise": near + 0.06 * tokens.std(0) * rng.standard_normal(near.shape),
        "average of 16 zoo networks": spec.padded(average(zoo.weights, n, min(16, len(zoo)), rng=rng)),
        "Gaussian of each weight": spec.padded(gaussian(zoo.weights, n, rng)),
        "kernel density of the codec's latents": np.asarray(trained.apply(density, support, mask, method="decode")),
        "ridge": ridge(condition).reshape(near.shape),
        "hypernetwork": hyper(condition).reshape(near.shape),
        "generated": samples[0],
        "generated, 8 averaged": samples.mean(0),
        "generated, best of 8 by selection set": samples[by_select.argmax(0), np.arange(n)],
        "generated, wrong order of classes": shuffled,
    }
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, made in starts.items():
        now = made if isinstance(made, dict) else spec.unflatten(jnp.asarray(made, jnp.float32), like)
        table[name] = {}
        for budget in BUDGETS:
            after = now if budget == 0 else tune(size, cfg, now, x, y, budget, seed)
            found = Estimate.of(accuracy(labels(after, xt), yt, 5))
            table[name][str(budget)] = {"mean": found.mean, "ci95": found.half}
    lap("judging")

    some = np.sort(rng.choice(len(tokens), min(100, len(tokens)), replace=False))
    own, own_labels = pictures(world, world.test, classes[some], min(size.pictures, 50), [seed, 4])
    mask = np.ones((len(some), 5, SHOTS), bool)
    seen = world.told.draw(classes[some], SHOTS, rng)
    coded = trained.apply(trained.apply(tokens[some], seen, mask, method="encode"), seen, mask, method="decode")
    before, after = (accuracy(labels(t, own), own_labels, 5) for t in (tokens[some], coded))
    codec = Gate.of(before, after, given=tokens[some], back=np.asarray(coded), tolerance=0.02)
    drawn = samples[0]
    if begin == "aligned":
        # Neurons in the zoo's order, or distances would count the order.
        drawn = spec.flatten(matched(spec.unflatten(drawn, like), {k: v[0] for k, v in tree.items()}, cfg))
    theirs = np.stack([labels(np.broadcast_to(tokens[i], near[:5].shape), xt[:5]) for i in some[:30]]) != yt[:5]
    distances = {
        "generated": nearest_distance(flat(spec, drawn), zoo.weights),
        "within the zoo": nearest_distance(zoo.weights[:200], zoo.weights, skip_self=True),
        "zoo network + 0.06 noise": nearest_distance(noisy(zoo.weights[:50], 0.06, rng), zoo.weights),
    }
    lap("report")
    overlaps = [error_overlap(predicted[0][i : i + 1] != yt[i], theirs[:, i])[0] for i in range(len(theirs[0]))]
    return {
        "kind": kind, "begin": begin, "prior": prior, "seed": seed, "accuracy": table,
        "at 0 steps": {"single": float(by_test.mean()), ORACLE: float(by_test.max(0).mean())},
        "zoo": codec.before, "zoo after codec": codec.after, "codec error": codec.error,
        "distance": {name: float(np.median(found)) for name, found in distances.items()},
        "error IoU": float(np.mean(overlaps)),
        "disagreement": disagreement(predicted),
        "seconds of CPU": seconds,
    }  # fmt: skip


def tune(size: Size, cfg: NetConfig, params: Any, x: Any, y: Any, steps: int, seed: int) -> Any:
    """The same optimizer for every start: Adam at the zoo's rate, no more than `steps` steps."""
    return _tuner(replace(size.fit[cfg.kind], steps=steps), cfg)(params, x, y, jax.random.key(seed))


@cache
def _tuner(few: FitConfig, cfg: NetConfig) -> Any:
    return jax.jit(lambda params, x, y, key: fit_population(net(cfg), params, x, y=y, cfg=few, key=key))


def _after(name: str) -> Callable[[dict[str, Any], str], float]:
    """Reads a method's accuracy from a row, after a number of fine-tuning steps."""
    return lambda row, budget: row["accuracy"][name][budget]["mean"]


def tables(rows: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown, a table per kind of network: accuracy in % by fine-tuning steps and start."""
    parts = []
    for kind, ours in bench.groups(rows, "kind").items():
        found = bench.groups(ours, "begin")
        of = {begin: found[begin] for begin in BEGINS if begin in found}
        columns = list(itertools.product(of, BUDGETS))
        head = [kind, *(f"{begin}: {budget}" if budget == 0 else str(budget) for begin, budget in columns)]
        names, priors = list(rows[0]["accuracy"]), list(bench.groups(ours, "prior"))
        coded = [name for name in names if name.startswith(("generated", "kernel density"))]

        def line(label: str, name: str, prior: str, of: Any = of, columns: Any = columns) -> list[str]:
            cells = [label]
            for begin, budget in columns:
                mine = [row for row in of[begin] if row["prior"] == prior]
                cells.append("" if name == ORACLE and budget else percent([score(row, name, budget) for row in mine]))
            return cells

        body = [line(name, name, priors[0]) for name in names if name not in coded]
        for prior, name in itertools.product(priors, [*coded, ORACLE]):
            body.append(line(f"{name}, {TOLD[prior]}", name, prior))
        lines = bench.markdown(head, body)
        for begin, mine in of.items():
            share = {name: percent([row[name] for row in mine]) for name in ("zoo", "zoo after codec", "disagreement")}
            far = {name: np.mean([row["distance"][name] for row in mine]) for name in mine[0]["distance"]}
            took = sum(sum(row["seconds of CPU"].values()) for row in mine)
            lines += [
                f"\n{begin}: zoo networks have {share['zoo']} % on their own tasks,",
                f"{share['zoo after codec']} % through the codec. The nearest one is {far['generated']:.2f} from a",
                f"generated network, {far['within the zoo']:.2f} from another of the zoo, and",
                f"{far['zoo network + 0.06 noise']:.2f} from itself with noise. Error IoU",
                f"{np.mean([row['error IoU'] for row in mine]):.2f}, samples disagree on {share['disagreement']} %.",
                f"{len(mine)} arms, {took / 60:.0f} minutes of CPU.",
            ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def score(row: dict[str, Any], name: str, budget: int) -> float:
    return row["at 0 steps"][ORACLE] if name == ORACLE else row["accuracy"][name][str(budget)]["mean"]


def percent(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f}" if values else ""


if __name__ == "__main__":
    main()

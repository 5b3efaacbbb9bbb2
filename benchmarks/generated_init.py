"""Generated networks as initialisation, where weights are no convex affair.

    python benchmarks/generated_init.py --data fashion-mnist --runs runs/cpu --json benchmarks/results/generated_init_cpu.json
    python benchmarks/generated_init.py --size gpu --data fashion-mnist --runs runs/gpu --json benchmarks/results/generated_init_gpu.json

--data: a folder of .npy arrays, train_image.npy [n, 28, 28] or [n, 32, 32, 3] uint8, train_label.npy [n], and test_* alike. Zoos of MLPs
(64-16-5, on PCA features) and of the 2,464-parameter CNN are trained on random 5-class subsets, from one shared initialisation, from
random ones, and from random ones with matched neurons. One generator per zoo, conditioned on 5 pictures of each class in the task's
order; subsets with a held-out class pair are never in a zoo. Networks are judged at 0, 1, 5 and 25 steps of fine-tuning on the
target, beside random, shared and zoo-mean initialisation, the nearest zoo network, a zoo network with noise, and ridge. Every arm of
every seed is saved when it is done, and a run that is stopped goes on with the next; losing rows stay in.
"""

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import InputError
from common.nn.functional import functional
from common.train.loop import Run
from common.train.mesh import start
from common.train.optim import OptimConfig
from weightgen import align
from weightgen.baselines import Ridge, nearest_model, noisy
from weightgen.data import Bank, Projection
from weightgen.denoiser import DenoiserConfig
from weightgen.evaluate import Estimate, nearest_distance
from weightgen.generator import FITTED, Generator, GeneratorConfig, SampleConfig, drawer, fit_stage1, loss
from weightgen.nets import NetConfig, net
from weightgen.train import LoopConfig, fit, generator_batches
from weightgen.zoo import FitConfig, Zoo, accuracy, build, fit_population, flat, head_tokens, initial_population

BUDGETS = (0, 1, 5, 25)  # steps of fine-tuning
HIDDEN = {"mlp": ("hidden",), "cnn": ("first", "second", "hidden")}  # units that may be permuted; a third-layer channel is tied to cells
SHOTS = 5


@dataclass(frozen=True)
class Size:
    """What a machine can do."""

    members: int
    pictures: int
    """Of each class, per network."""
    fit: FitConfig
    steps: int
    tasks: int
    kinds: tuple[str, ...] = ("mlp", "cnn")
    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig(width=128, layers=4, heads=4, hidden=256))


SIZES = {
    "smoke": Size(30, 8, FitConfig(steps=3, batch=16, lr=0.01), 3, 2, denoiser=DenoiserConfig(width=16, layers=1, heads=2, hidden=16)),
    "cpu": Size(1000, 100, FitConfig(steps=200, batch=64, lr=0.01), 2000, 40),
    "gpu": Size(4000, 500, FitConfig(steps=1000, batch=128, lr=0.005), 20_000, 100, denoiser=DenoiserConfig(384, 8, 6, 1536)),
}


@dataclass(frozen=True)
class World:
    """Pictures by class as one kind of network sees them, and as the condition does (PCA features); train and test."""

    train: Bank
    test: Bank
    told: Bank
    shape: tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, required=True, help="where trainings and finished arms are kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    size, rows = SIZES[args.size], []
    args.runs.mkdir(parents=True, exist_ok=True)
    for kind, begin, seed in itertools.product(size.kinds, ("shared", "random", "aligned"), args.seeds):
        done = args.runs / f"{args.size}-{kind}-{begin}-{seed}.json"
        if not done.exists():
            found = arm(size, read(args.data, kind), kind, begin, seed, args.runs / done.stem)
            done.write_text(json.dumps(found, indent=2) + "\n")
        rows.append(json.loads(done.read_text()))
        report(rows[-1:])
    report(rows)
    if args.json:
        device = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else f"CPU, {platform.machine()}"
        made = {"date": date.today().isoformat(), "device": device, "versions": {n: version(n) for n in ("jax", "flax", "optax")}}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(made | {"size": asdict(size), "data": args.data.name, "rows": rows}, indent=2) + "\n")


def read(folder: Path, kind: str) -> World:
    """28 x 28 pictures in [-1, 1] for a CNN, 64 PCA features for an MLP."""
    arrays = {}
    for name in ("train_image", "train_label", "test_image", "test_label"):
        if not (folder / f"{name}.npy").is_file():
            raise InputError(f"{folder}/{name}.npy is missing: store the pictures as .npy arrays")
        arrays[name] = np.load(folder / f"{name}.npy")
    x, t = (arrays[f"{part}_image"].astype(np.float32) / 127.5 - 1 for part in ("train", "test"))
    if x.shape[1] == 32:
        x, t = x[:, 2:30, 2:30], t[:, 2:30, 2:30]
    x, t = (a.reshape(*a.shape[:3], -1) for a in (x, t))
    names = [str(c) for c in np.unique(arrays["train_label"])]
    project = Projection.fit("pixels", x[:10_000].reshape(min(len(x), 10_000), -1), 64)
    told = project(x.reshape(len(x), -1))
    y, u = arrays["train_label"], arrays["test_label"]
    if kind == "mlp":
        return World(Bank.of(told, y, names), Bank.of(project(t.reshape(len(t), -1)), u, names), Bank.of(told, y, names), (64,))
    return World(Bank.of(x.reshape(len(x), -1), y, names), Bank.of(t.reshape(len(t), -1), u, names), Bank.of(told, y, names), x.shape[1:])


def arm(size: Size, world: World, kind: str, begin: str, seed: int, folder: Path) -> dict[str, Any]:
    """Zoo, generator and every initialisation, judged on subsets no zoo network saw."""
    begun = time.perf_counter()
    rng = np.random.default_rng(seed)
    subsets = np.array(list(itertools.permutations(range(len(world.train.names)), 5)), np.int32)
    # No zoo network is trained on a subset that holds both classes of the last pair; targets all do.
    pair = np.isin(subsets, (len(world.train.names) - 2, len(world.train.names) - 1)).sum(1) == 2
    classes = subsets[~pair][rng.choice((~pair).sum(), size.members)]
    targets = subsets[pair][rng.choice(pair.sum(), size.tasks, replace=False)]
    cfg = NetConfig(kind, features=world.shape[-1], classes=5)
    model, spec = net(cfg), head_tokens(cfg)

    def pictures(bank: Bank, rows: np.ndarray, each: int, salt: int) -> tuple[np.ndarray, np.ndarray]:
        x = bank.draw(rows, each, np.random.default_rng([seed, salt]))
        y = np.broadcast_to(np.repeat(np.arange(5), each), (len(rows), 5 * each)).astype(np.int32)
        return x.reshape(len(rows), 5 * each, *world.shape), y

    first = "shared" if begin == "shared" else "random"
    parts = build(
        cfg, lambda a, b: pictures(world.train, classes[a:b], size.pictures, a), size.members, size.fit, start=first, chunk=100, seed=seed
    )
    trees = [{k: np.asarray(v) for k, v in part.items()} for part in parts]
    tree = {k: np.concatenate([t[k] for t in trees]) for k in model.spec}
    if begin == "aligned":
        groups = align.symmetries(model.spec, HIDDEN[kind])
        members = [{k: v[i] for k, v in tree.items()} for i in range(size.members)]
        aligned = [align.align(members[0], member, groups) for member in members]
        tree = {k: np.stack([member[k] for member in aligned]) for k in tree}
    zoo = Zoo(flat(spec, spec.flatten(tree)), np.zeros(size.members, np.float32), classes, cfg, spec)

    latent = min(48, spec.length, size.members * spec.rows)
    config = GeneratorConfig(cfg, latent, "mlp", SHOTS, "none", size.denoiser)
    # The condition is PCA features for either kind of network.
    config = replace(config, told=world.told.features.shape[1])
    generator, mesh = functional(Generator, config), start(LoopConfig().mesh)
    loop = LoopConfig(
        size.steps,
        min(128, size.members),
        OptimConfig(lr=5e-4, warmup=max(size.steps // 20, 1), clip=1.0),
        seed=seed,
        save_every=size.steps,
    )
    fitted = {path: jnp.asarray(value) for path, value in fit_stage1(config, zoo, world.told, seed).items()}
    params = fit(
        Run.open(folder, {"seed": seed, "kind": kind, "begin": begin, "size": asdict(size)}),
        loop,
        mesh,
        generator.spec,
        lambda: generator.init(jax.random.key(seed)) | fitted,
        loss(generator, config, 0.1),
        generator_batches(zoo, world.told, SHOTS, loop, mesh),
        frozen=FITTED[:1],
    )
    support = world.told.draw(targets, SHOTS, rng)
    there = np.ones(support.shape[:3], bool)
    draw = drawer(generator, config, SampleConfig(steps=50))
    samples = np.stack(
        [np.asarray(draw(params, support, there, jax.random.key(seed), np.arange(len(targets)) + i * len(targets))) for i in range(8)]
    )
    shuffled = np.asarray(draw(params, np.roll(support, 1, axis=1), there, jax.random.key(seed), np.arange(len(targets))))

    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in model.spec.items()}
    tokens = zoo.tokens(slice(None))
    told = world.told.draw(classes, SHOTS, rng).mean(2)
    condition = support.mean(2).reshape(len(targets), -1)
    ridge = Ridge.fit(told.reshape(len(told), -1), tokens.reshape(len(tokens), -1), classes[:, 0])
    near = nearest_model(condition, told.reshape(len(told), -1), tokens)
    starts: dict[str, Callable[[], Any]] = {
        "random init": lambda: initial_population(model, len(targets), "random", jax.random.key(seed + 1)),
        "the zoo's own init": lambda: initial_population(model, len(targets), "shared", jax.random.key(seed)),
        "zoo mean": lambda: np.broadcast_to(tokens.mean(0), near.shape),
        "nearest zoo network": lambda: near,
        "nearest zoo network + 0.06 noise": lambda: near + 0.06 * tokens.std(0) * rng.standard_normal(near.shape),
        "random zoo network": lambda: tokens[rng.integers(len(tokens), size=len(targets))],
        "ridge": lambda: ridge(condition).reshape(near.shape),
        "generated": lambda: samples[0],
        "generated, 8 averaged": lambda: samples.mean(0),
        "generated, wrong order of classes": lambda: shuffled,
    }
    x, y = pictures(world.train, targets, size.pictures, 10**6)
    xt, yt = pictures(world.test, targets, min(size.pictures, 200), 10**6)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, make in starts.items():
        made = make()
        now = made if isinstance(made, dict) else spec.unflatten(jnp.asarray(made, jnp.float32), like)
        table[name] = {}
        for budget in BUDGETS:
            after = now if budget == 0 else tune(size, cfg, now, x, y, budget, seed)
            found = Estimate.of(np.asarray(accuracy(model, after, xt, yt)))
            table[name][str(budget)] = {"mean": found.mean, "ci95": found.half}
    drawn = flat(spec, samples[0])
    own = accuracy(model, {k: v[:50] for k, v in tree.items()}, *pictures(world.test, classes[:50], 50, 7))
    return {
        "kind": kind, "begin": begin, "seed": seed, "accuracy": table,
        "zoo": float(np.mean(np.asarray(own))),
        "distance": float(np.median(nearest_distance(drawn, zoo.weights))),
        "distance within the zoo": float(np.median(nearest_distance(zoo.weights[:200], zoo.weights, skip_self=True))),
        "distance of noise": float(np.median(nearest_distance(noisy(zoo.weights[:50], 0.06, rng), zoo.weights))),
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def tune(size: Size, cfg: NetConfig, params: Any, x: Any, y: Any, steps: int, seed: int) -> Any:
    """The same optimizer for every start: Adam at the zoo's rate, no more than `steps` steps."""
    few = replace(size.fit, steps=steps)
    return jax.jit(lambda p, x, y: fit_population(net(cfg), p, x, y, few, jax.random.key(seed)))(params, x, y)


def report(rows: list[dict[str, Any]]) -> None:
    for kind, begin in dict.fromkeys((row["kind"], row["begin"]) for row in rows):
        mine = [row for row in rows if (row["kind"], row["begin"]) == (kind, begin)]
        print(f"\n{kind}, {begin} zoo ({len(mine)} seeds; zoo {100 * np.mean([r['zoo'] for r in mine]):.1f} % on its own tasks)")
        print(f"{'accuracy on unseen subsets, %, after steps':<44}" + "".join(f"{b:>8}" for b in BUDGETS))
        for name in mine[0]["accuracy"]:
            print(f"{name:<44}" + "".join(f"{100 * np.mean([r['accuracy'][name][str(b)]['mean'] for r in mine]):>8.1f}" for b in BUDGETS))


if __name__ == "__main__":
    main()

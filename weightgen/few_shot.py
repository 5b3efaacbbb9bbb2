"""Few-shot heads for classes the zoo never saw, from 5 pictures of each or 1, next to every baseline.

build the zoo  ->  prior and codec, no training  ->  gate  ->  a small diffusion transformer  ->  400 tasks of unseen
classes
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.errors import between, positive
from weightgen import baselines
from weightgen.codec import Gate
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.generator.in_memory import Trained, train_generator
from weightgen.generator.sample import SampleConfig
from weightgen.metrics import (
    Estimate,
    Scores,
    disagreement,
    error_overlap,
    head_accuracy,
    head_labels,
    nearest_distance,
)
from weightgen.tokens import TokenSpec
from weightgen.train import LoopConfig
from weightgen.zoo.data import Bank, EmojiTasks, draw_tasks
from weightgen.zoo.fit import FitConfig, build, fit_population, initial_population
from weightgen.zoo.nets import NetConfig, net
from weightgen.zoo.zoo import Zoo, flat, head_tokens

SHOTS = (5, 1)
SIGMAS = (0.02, 0.04, 0.06, 0.12)  # of the noise added to zoo heads, in spreads of each weight
OVERLAPS = 20  # tasks whose errors are compared
MOST = 40  # pictures of a class a zoo head is trained on


@dataclass(frozen=True)
class FewShotConfig:
    """Sizes of the comparison."""

    ways: int = 5
    members: int = 4000
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=60, lr=0.1, weight_decay=0.03))
    """Of the zoo's heads, with all pictures of their classes."""
    few: FitConfig = field(default_factory=lambda: FitConfig(steps=60, lr=0.1, weight_decay=0.3))
    """Of the baseline that trains on the 1 or 5 pictures; the penalty is the best of 0.003 to 0.3 on the selection set,
    and on seen classes that were left out (`benchmarks/one_picture.py`).
    """
    latent: int = 48
    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig(width=64, layers=2, heads=4, hidden=128))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=600, batch=128, save_every=10**9))
    tasks: int = 400
    samples: int = 48
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(steps=10))
    tolerance: float = 0.02
    """Accuracy the codec may lose on heads of unseen classes."""

    def __post_init__(self) -> None:
        positive(self, "ways", "members", "latent", "tasks", "samples")
        between(self, "tolerance")


@dataclass(frozen=True)
class Result:
    """Accuracies by (classes, shots), criteria by name, and further measurements."""

    rows: dict[str, dict[str, Estimate]]
    criteria: dict[str, dict[str, Any]]
    extra: dict[str, Any]


def build_zoo(cfg: FewShotConfig, tasks: EmojiTasks, seed: int) -> Zoo:
    """Train heads for random tasks of seen classes."""
    bank = tasks.seen["support"]
    classes = draw_tasks(len(bank.names), cfg.members, cfg.ways, rng=np.random.default_rng(seed))
    head = NetConfig(kind="head", features=bank.features.shape[1], classes=cfg.ways)
    spec = head_tokens(head)
    parts = build(head, lambda a, b: bank.all(classes[a:b], MOST), cfg.members, fit=cfg.fit, seed=seed)
    weights = np.concatenate([flat(spec, spec.flatten({k: np.asarray(v) for k, v in part.items()})) for part in parts])
    held = tasks.seen["test"]
    x, y = held.all(classes, int(held.counts.max()))
    quality = head_accuracy(spec.padded(weights), x, y).astype(np.float32)
    return Zoo(weights=weights, quality=quality, classes=classes, net=head, spec=spec)


def train(cfg: FewShotConfig, zoo: Zoo, bank: Bank, folder: Path, seed: int) -> Trained:
    """Train a generator of the zoo's heads in memory; `folder` holds the training run."""
    config = GeneratorConfig(net=zoo.net, latent=cfg.latent, denoiser=cfg.denoiser)
    loop = replace(cfg.loop, seed=seed, step=replace(cfg.loop.step, seed=seed))
    return replace(train_generator(config, zoo, bank, loop=loop, directory=folder), how=cfg.sample)


@dataclass(frozen=True)
class Episodes:
    """Few-shot tasks of seen or unseen classes.

    support: [task, way, 5, feature]; select and test: (x, y) of different concepts.
    """

    classes: np.ndarray
    support: np.ndarray
    whole: tuple[np.ndarray, np.ndarray]
    select: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, banks: dict[str, Bank], tasks: int, ways: int, seed: int) -> "Episodes":
        rng = np.random.default_rng([seed, 1])
        classes = draw_tasks(len(banks["support"].names), tasks, ways, rng=rng)
        parts = {name: bank.all(classes, int(bank.counts.max())) for name, bank in banks.items() if name != "support"}
        support, whole = banks["support"].draw(classes, max(SHOTS), rng), banks["support"].all(classes, MOST)
        return cls(classes=classes, support=support, whole=whole, select=parts["select"], test=parts["test"])


def few_shot_heads(support: np.ndarray, cfg: FitConfig, spec: TokenSpec, head: NetConfig) -> np.ndarray:
    """Train heads on the support alone, by gradient descent. support: [task, way, shots, feature]."""
    tasks, ways, shots, feature = support.shape
    y = np.broadcast_to(np.repeat(np.arange(ways), shots), (tasks, ways * shots)).astype(np.int32)
    return trained_heads(support.reshape(tasks, -1, feature), y, cfg, spec=spec, head=head)


def trained_heads(x: np.ndarray, y: np.ndarray, cfg: FitConfig, spec: TokenSpec, head: NetConfig) -> np.ndarray:
    """Train a head for each task, from zero. x: [task, example, feature]; y: [task, example]."""
    return spec.flatten({path: np.asarray(leaf) for path, leaf in _trainer(cfg, head)(x, y).items()})


@cache
def _trainer(cfg: FitConfig, head: NetConfig) -> Callable[[np.ndarray, np.ndarray], Any]:
    """Compiled once for each shape of tasks."""
    model, key = net(head), jax.random.key(0)

    def fit(x: Any, y: Any) -> Any:
        return fit_population(model, initial_population(model, len(x), "shared", key=key), x, y=y, cfg=cfg, key=key)

    return jax.jit(fit)


def compare(
    cfg: FewShotConfig, tasks: EmojiTasks, folder: Path, seed: int, say: Callable[[str], None] = print
) -> Result:
    """Run the whole comparison on one backbone; `folder` holds the training run."""
    zoo = build_zoo(cfg, tasks, seed)
    quality = f"{100 * zoo.quality.mean():.1f} % right on unseen pictures of their classes"
    say(f"zoo: {len(zoo):,} heads of {zoo.spec.count} weights, {quality}")
    bank = tasks.seen["support"]
    generator = train(cfg, zoo, bank, folder=folder, seed=seed)
    banks_of = {"unseen": tasks.unseen, "seen": tasks.seen}
    sets = {kind: Episodes.of(banks, cfg.tasks, cfg.ways, seed=seed) for kind, banks in banks_of.items()}
    found = codec_gate(cfg, generator, sets["unseen"], zoo=zoo)
    trip = f"{100 * found.before:.1f} % before, {100 * found.after:.1f} % after a round trip of unseen heads"
    say(f"codec: {trip}, error {found.error:.3f}")
    found.check()
    known = ZooStatistics.of(zoo, bank, seed)
    rows: dict[str, dict[str, Estimate]] = {}
    by_task: dict[str, np.ndarray] = {}
    extra: dict[str, Any] = {}
    for kind, episodes in sets.items():
        for shots in SHOTS:
            judged = evaluate(cfg, episodes, shots, zoo=zoo, known=known, generator=generator, seed=seed)
            rows[f"{kind}, {shots}"] = judged.rows
            if kind == "unseen":
                by_task |= {f"{name}, {shots}": value for name, value in judged.by_task.items()}
                extra |= {f"{name}, {shots}": value for name, value in judged.extra.items()}
    codec = {"before": found.before, "after": found.after, "error": found.error}
    return Result(rows, criteria(cfg, by_task, extra), extra | {"codec": codec})


@dataclass(frozen=True)
class ZooStatistics:
    """What the baselines know of the zoo.

    Heads, mean features of each task's and each row's class, maps from the condition of a row to it by shots, spread
    within classes.
    """

    heads: np.ndarray
    tasks: np.ndarray
    rows: np.ndarray
    ridge: dict[int, baselines.Ridge]
    network: dict[int, Callable[[Any], np.ndarray]]
    spread: np.ndarray

    @classmethod
    def of(cls, zoo: Zoo, bank: Bank, seed: int) -> "ZooStatistics":
        heads, classes = zoo.tokens(slice(None)), np.asarray(zoo.classes)
        rows, rng, ridge, network = bank.means[classes], np.random.default_rng([seed, 2]), {}, {}
        for shots in SHOTS:
            condition = baselines.row_condition(bank.draw(classes, shots, rng).mean(2))
            x, y = condition.reshape(-1, condition.shape[-1]), heads.reshape(-1, heads.shape[-1])
            ridge[shots] = baselines.Ridge.fit(x, y, classes.reshape(-1))
            network[shots] = baselines.hypernetwork(x, y, seed)
        inner = bank.features - np.repeat(bank.means, bank.counts, axis=0)
        about: dict[str, Any] = dict(heads=heads, tasks=rows.mean(1), rows=rows, ridge=ridge, network=network)
        return cls(**about, spread=inner.T @ inner / len(inner))


@dataclass(frozen=True)
class Judged:
    """Rows of the table, accuracies [task] for paired comparisons, and novelty and diversity of the generated heads."""

    rows: dict[str, Estimate]
    by_task: dict[str, np.ndarray]
    extra: dict[str, Any]


def evaluate(
    cfg: FewShotConfig, episodes: Episodes, shots: int, *, zoo: Zoo, known: ZooStatistics, generator: Trained, seed: int
) -> Judged:
    """Run all methods on the same tasks."""
    assert zoo.net is not None
    support, rng = episodes.support[:, :, :shots], np.random.default_rng([seed, 3])
    mean, n, length = support.mean(2), len(support), known.heads.shape[-1]
    pick = rng.integers(len(zoo), size=n)
    condition = baselines.row_condition(mean)
    flat_zoo = known.heads.reshape(len(zoo), -1)
    methods = {
        "random head": np.asarray(rng.standard_normal((n, cfg.ways, length)), np.float32),
        "zoo mean": np.broadcast_to(known.heads.mean(0), (n, cfg.ways, length)),
        "average of 16 zoo heads": baselines.average(flat_zoo, n, 16, rng=rng).reshape(n, cfg.ways, length),
        "Gaussian per weight": baselines.gaussian(flat_zoo, n, rng).reshape(n, cfg.ways, length),
        "KDE of the best 30 % in latents": kde_heads(generator, zoo, known, n=n, rng=rng),
        **{
            f"zoo head + {sigma} noise": (
                known.heads[pick] + sigma * known.heads.std(0) * rng.standard_normal((n, cfg.ways, length))
            )
            for sigma in SIGMAS
        },
        "nearest zoo head": baselines.nearest_model(mean.mean(1), known.tasks, known.heads),
        "nearest zoo row per class": baselines.nearest_row(
            mean, known.rows.reshape(-1, mean.shape[-1]), known.heads.reshape(-1, length)
        ),
        "prototype": baselines.prototype(support),
        "linear discriminant": baselines.discriminant(support, known.spread),
        "gradient descent on the pictures": few_shot_heads(support, cfg.few, zoo.spec, head=zoo.net),
        "hypernetwork": known.network[shots](condition.reshape(-1, condition.shape[-1])).reshape(n, cfg.ways, length),
        "ridge": known.ridge[shots](condition.reshape(-1, condition.shape[-1])).reshape(n, cfg.ways, length),
        "trained on all pictures of the classes": trained_heads(*episodes.whole, cfg.fit, zoo.spec, zoo.net),
    }
    by_task = {name: head_accuracy(heads, *episodes.test) for name, heads in methods.items()}
    samples = sample(cfg, generator, episodes.support, shots=shots, seed=seed)
    scores = Scores.of(samples, episodes.select, episodes.test)
    # Task i gets the pictures of task i + 1: what remains above chance ignores the condition.
    other = np.roll(episodes.support, 1, axis=0)
    shuffled = sample(replace(cfg, samples=1), generator, other, shots=shots, seed=seed)[0]
    by_task |= {
        "generated, averaged": scores.mean,
        "generated from another task's pictures": head_accuracy(shuffled, *episodes.test),
    }
    shown = {name: values for name, values in by_task.items() if name != "generated, averaged"}
    rows = {name: Estimate.of(values) for name, values in shown.items()} | scores.rows("generated")
    everything = flat(zoo.spec, samples[0])
    mask, labels = episodes.test[1] >= 0, head_labels(samples, episodes.test[0])
    overlaps = []
    for x, y, seen, found in list(zip(*episodes.test, mask, labels[0], strict=True))[:OVERLAPS]:
        others = head_labels(known.heads[:, None], x[None])[:, 0]
        overlaps.append(error_overlap(((found != y) & seen)[None], (others != y) & seen))
    distances = {
        "generated": nearest_distance(everything, zoo.weights),
        "zoo": nearest_distance(zoo.weights[:n], zoo.weights, skip_self=True),
        "noise": nearest_distance(flat(zoo.spec, methods["zoo head + 0.04 noise"]), zoo.weights),
    }
    extra = {
        "novelty": {name: float(np.median(found)) for name, found in distances.items()},
        "error IoU": float(np.mean(overlaps)),
        "disagreement": disagreement(labels[:, mask]),
    }
    return Judged(rows, by_task, extra)


def kde_heads(generator: Trained, zoo: Zoo, known: ZooStatistics, n: int, rng: np.random.Generator) -> np.ndarray:
    """Sample heads [n, way, feature + 1] by S_KDE30: the zoo's best 30 % in the codec's latents, no prior."""
    cfg = generator.cfg
    no_prior = {"prior/table": jnp.zeros_like(generator.params["prior/table"])}
    codec = replace(generator, params=generator.params | no_prior)
    heads = known.heads[zoo.quality >= np.quantile(zoo.quality, 0.7)]

    def through(method: str, x: np.ndarray) -> np.ndarray:
        support = np.zeros((len(x), cfg.ways, cfg.shots, cfg.features), np.float32)
        return np.asarray(codec.apply(x, support, np.ones(support.shape[:3], bool), method=method))

    latents = through("encode", heads)
    drawn = baselines.kde(latents.reshape(len(latents), -1), n, rng)
    return through("decode", drawn.reshape(n, *latents.shape[1:]))


def sample(cfg: FewShotConfig, generator: Trained, support: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Draw heads [sample, task, way, feature + 1]; sample s of task t has the index s * tasks + t."""
    n = len(support)
    mask = np.broadcast_to(np.arange(support.shape[2]) < shots, support.shape[:3])
    key = jax.random.key(seed)
    return np.stack([generator.draw(support, mask, key, np.arange(s * n, (s + 1) * n)) for s in range(cfg.samples)])


def codec_gate(cfg: FewShotConfig, generator: Trained, episodes: Episodes, zoo: Zoo) -> Gate:
    """Measure the codec on heads of unseen classes, trained on all their pictures."""
    assert zoo.net is not None
    heads = trained_heads(*episodes.whole, cfg.fit, zoo.spec, zoo.net)
    mask = np.ones(episodes.support.shape[:3], bool)
    latents = generator.apply(heads, episodes.support, mask, method="encode")
    back = np.asarray(generator.apply(latents, episodes.support, mask, method="decode"))
    before, after = (head_accuracy(x, *episodes.test) for x in (heads, back))
    return Gate.of(before, after, given=heads, back=back, tolerance=cfg.tolerance)


def criteria(cfg: FewShotConfig, by_task: dict[str, np.ndarray], extra: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Judge the criteria on unseen classes: each with its measurement, 95 % interval, bar, and whether it is met."""

    def above(a: str, b: str, bar: float) -> dict[str, Any]:
        gap = Estimate.of(by_task[a] - by_task[b])
        return {"measured": str(gap), "bar": f"> {100 * bar:g}", "met": gap.mean - gap.half > bar}

    out = {}
    for shots in SHOTS:
        averaged, nearest = f"generated, averaged, {shots}", f"nearest zoo row per class, {shots}"
        out[f"{shots} pictures: averaged - nearest row"] = above(averaged, nearest, 0.05)
    descent = "gradient descent on the pictures, 1"
    out["1 picture: averaged - gradient descent"] = above("generated, averaged, 1", descent, 0.0)
    for shots in SHOTS:
        gap = Estimate.of(by_task[f"generated from another task's pictures, {shots}"] - 1 / cfg.ways)
        small = abs(gap.mean) + gap.half < 0.03
        row = {"measured": str(gap), "bar": "within 3", "met": small}
        out[f"{shots} pictures: shuffled condition - chance"] = row
    for shots in SHOTS:
        found = extra[f"novelty, {shots}"]
        met = found["generated"] >= found["zoo"]
        measured = f"{found['generated'] / found['zoo']:.2f}"
        out[f"{shots} pictures: distance to the zoo / within it"] = {"measured": measured, "bar": ">= 1", "met": met}
    return out

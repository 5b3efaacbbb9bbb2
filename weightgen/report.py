"""The report on generated networks: accuracies next to baselines, novelty, diversity."""

from dataclasses import asdict, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from heirloom.common.checkpoint.family import Donor
from heirloom.common.files import read_json
from heirloom.common.mesh import start
from heirloom.common.train.parameters import load_params
from weightgen.baselines import nearest_model, noisy, prototype
from weightgen.d2nwg.model import D2nwgConfig
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.sample import SampleConfig
from weightgen.metrics import accuracy, disagreement, error_overlap, head_accuracy, nearest_distance
from weightgen.tasks import Pictures, Task, draw_weights, read_words
from weightgen.zoo.fit import FitConfig, fit_population, initial_population
from weightgen.zoo.nets import NetConfig, net, predict
from weightgen.zoo.zoo import flat

FEW = {
    "head": FitConfig(steps=60, lr=0.1, weight_decay=0.3),
    "mlp": FitConfig(steps=60, lr=0.01),
    "cnn": FitConfig(steps=60, lr=0.01),
}


def report(donor: Donor, task: Task, samples: np.ndarray, how: SampleConfig, seed: int) -> dict[str, Any]:
    """Measure accuracy on the pictures left over, next to baselines, novelty, diversity, and use of the condition.

    That use is None where the condition does not know the order of classes.
    """
    cfg: Any = donor.cfg
    about: dict[str, Any] = {
        "classes": list(task.names),
        "condition": f"{task.shots}-shot, 0 gradient steps" if task.support else f"{cfg.condition}, 0 gradient steps",
        "seed": seed,
        # The reference takes all its steps, whatever is asked for.
        "sample": asdict(SampleConfig(sampler="ddpm", steps=cfg.steps) if isinstance(cfg, D2nwgConfig) else how),
        "parameters": cfg.whole.count,
        "accuracy": None,
    }
    zoo = load_file(donor.folder / "neighbours.safetensors")
    rng, mine = np.random.default_rng(seed), flat(cfg.whole, samples)
    if isinstance(cfg, GeneratorConfig) and cfg.condition == "chunk":
        return about | {"novelty": _novelty(samples.reshape(-1, cfg.whole.length), zoo["weights"], rng)}
    about["novelty"] = _novelty(mine, zoo["weights"], rng)
    if cfg.net is None:
        known = read_json(donor.folder / "tasks.json")["tasks"]
        by_words = "the zoo has no task of these words: the generator goes by their embedding"
        note = {} if task.names[0] in known else {"note": by_words}
        distances = _task_distances(donor, task, samples, zoo=zoo, how=how, seed=seed)
        return about | note | {"distance to the task's own networks": distances}
    if task.support is None or task.select is None or task.test is None:
        left_out = "no class has pictures left over, so these weights are not evaluated; add more pictures"
        return about | {"note": left_out}
    ways, y = len(task.names), task.test.y
    found = labels_of(cfg, samples, task.test.x)
    scores = accuracy(found, y, ways)
    chosen = int(accuracy(labels_of(cfg, samples, task.select.x), task.select.y, ways).argmax())
    turned = draw_weights(donor, replace(task, condition=np.roll(task.condition, 1, axis=1)), how, n=1, seed=seed)
    others = _zoo_baselines(donor, task, zoo, rng=rng)
    alone = trained_on(cfg.net, task.support, seed)
    one: Any = {
        "single sample": scores.mean(),
        "weights averaged": accuracy(labels_of(cfg, samples.mean(0, keepdims=True), task.test.x), y, ways)[0],
        "best by selection set": scores[chosen],
        "best by test (oracle)": scores.max(),
        "pictures of the wrong classes": (
            accuracy(labels_of(cfg, turned, task.test.x), y, ways)[0] if knows_order(cfg) else None
        ),
        **{name: accuracy(labels_of(cfg, tokens, task.test.x), y, ways).mean() for name, tokens in others.items()},
        "prototype": head_accuracy(prototype(task.condition[:, :, : task.shots]), task.test.features[None], y[None])[0],
        "gradient descent on the pictures": accuracy(predict(cfg.net, alone, task.test.x[None]), y, ways)[0],
        "chance": 1 / ways,
    }
    about["accuracy"] = {name: None if value is None else round(float(value), 5) for name, value in one.items()}
    theirs = labels_of(cfg, cfg.whole.padded(zoo["weights"][:200]), task.test.x)
    return about | {
        "test pictures": int(y.size),
        "selected": chosen,
        "disagreement": disagreement(found) if len(found) > 1 else None,
        "error IoU": float(error_overlap(found != y, theirs != y).mean()),
    }


def labels_of(cfg: GeneratorConfig | D2nwgConfig, tokens: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Predict classes with networks [n, token, length] on pictures x: [n, picture]."""
    params = cfg.whole.unflatten(jnp.asarray(tokens), cfg.whole.like)
    return predict(cast(NetConfig, cfg.net), params, np.broadcast_to(x, (len(tokens), *x.shape)), at_once=50)


def trained_on(cfg: NetConfig, pictures: Pictures, seed: int) -> dict[str, jax.Array]:
    """Train a network on these pictures alone, from scratch: a population of one."""
    model = net(cfg)
    begin = initial_population(model, 1, "random", key=jax.random.key(seed))
    x, y = jnp.asarray(pictures.x[None]), jnp.asarray(pictures.y[None], jnp.int32)
    return fit_population(model, begin, x, y=y, cfg=FEW[cfg.kind], key=jax.random.key(seed))


def knows_order(cfg: GeneratorConfig | D2nwgConfig) -> bool:
    """Tell whether the condition says which class is which.

    Set Transformers do not: the same classes in another order give the same condition. A linear prior in addition does.
    """
    if isinstance(cfg, D2nwgConfig):
        return cfg.encoder != "set"
    return bool(cfg.condition != "set" or cfg.prior == "linear")


def _zoo_baselines(
    donor: Donor, task: Task, zoo: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Build the baselines that need the zoo but no diffusion: tokens [n, token, length] by name."""
    cfg, weights = donor.cfg, zoo["weights"]
    made = {"zoo mean": weights.mean(0)[None], "zoo networks + 0.04 noise": noisy(weights, 0.04, rng)[:50]}
    if "told" in zoo:  # class by class: a network for the same classes in another order does not fit
        wanted = task.condition[:, :, : task.shots].mean(2)
        told = zoo["told"].reshape(len(weights), -1)
        made["nearest zoo network"] = nearest_model(wanted.reshape(1, -1), told, weights)
    found = {name: cfg.whole.padded(rows) for name, rows in made.items()}
    if isinstance(cfg, GeneratorConfig) and cfg.prior == "linear":
        mask = np.broadcast_to(np.arange(cfg.shots) < task.shots, task.condition.shape[:3])
        params = load_params(donor, start())
        found["ridge"] = np.asarray(donor.model.apply(params, jnp.asarray(task.condition), mask, method="expected"))
    return found


def _novelty(weights: np.ndarray, zoo: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Measure medians of the L2 distance to the nearest stored network: of samples, zoo, noisy zoo."""
    found = {
        "generated": nearest_distance(weights, zoo),
        "zoo": nearest_distance(zoo, zoo, skip_self=True),
        "noise": nearest_distance(noisy(zoo, 0.04, rng), zoo),
    }
    return {name: float(np.median(distances)) for name, distances in found.items()} | {"of": len(zoo)}


def _task_distances(
    donor: Donor, task: Task, samples: np.ndarray, zoo: dict[str, np.ndarray], how: SampleConfig, seed: int
) -> Any:
    """Measure mean L2 distances to the task's mean, of its networks, samples, another task's; None if unseen."""
    known = read_json(donor.folder / "tasks.json")["tasks"]
    own = zoo["classes"][:, 0] == (known.index(task.names[0]) if task.names[0] in known else -1)
    if not own.any() or len(known) < 2:
        return None
    words = read_words(donor, known[known.index(task.names[0]) - 1])
    other = draw_weights(donor, words, how, n=len(samples), seed=seed)
    centre = zoo["weights"][own].mean(0)
    sets = {"told it": samples, "told another": other}
    whole = donor.cfg.whole
    return {name: float(np.linalg.norm(flat(whole, x) - centre, axis=1).mean()) for name, x in sets.items()}

"""`heirloom generate PATH`: weights for the classes of a folder of pictures, or for a task in words, and a report of what they are."""

import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from heirloom.common import config
from heirloom.common.checkpoint.convert import Donor
from heirloom.common.checkpoint.staging import staged
from heirloom.common.checkpoint.weights import read_json, write_config, write_json, write_params
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError, nearest
from heirloom.common.train.mesh import MeshConfig, start
from heirloom.common.train.parameters import load_params
from weightgen import reference
from weightgen.adapter_config import write_adapter
from weightgen.baselines import nearest_model, noisy, prototype
from weightgen.data import Projection, encoder, labelled, shown, text_encoder, thumbnails
from weightgen.evaluate import accuracy, disagreement, error_overlap, head_accuracy, nearest_distance
from weightgen.foreign import listed
from weightgen.formats import FAMILY, NETWORK, REFERENCE
from weightgen.generator import GeneratorConfig, SampleConfig, drawer
from weightgen.nets import NetConfig, net, predict
from weightgen.reference import ReferenceConfig
from weightgen.zoo import FitConfig, fit_population, flat, initial_population

FEW = {"head": FitConfig(60, lr=0.1, weight_decay=0.3), "mlp": FitConfig(60, lr=0.01), "cnn": FitConfig(60, lr=0.01)}
WORDS = ("text", "label", "chunk")  # conditions that are no pictures


@dataclass(frozen=True)
class Pictures:
    """told: [picture, feature], as the generator sees them; x: as the network does; y: [picture] labels."""

    told: np.ndarray
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Task:
    """What to make: a condition [item, class, shots, feature], of which `shots` count; one item, or one for each chunk of a checkpoint.

    support, select, test: different pictures to look at, choose by and test on; None for a task in words, the latter two also where a
    class has no pictures left over.
    """

    names: tuple[str, ...]
    condition: np.ndarray
    shots: int
    support: Pictures | None = None
    select: Pictures | None = None
    test: Pictures | None = None


@dataclass(frozen=True)
class Drawn:
    """Tokens [sample, token, length] of whole networks, and the averaged one."""

    samples: np.ndarray
    mean: np.ndarray


def look(dataset: str, projection: Projection, cfg: NetConfig) -> tuple[tuple[str, ...], Pictures]:
    """The classes of a folder with a sub-folder for each, and its pictures. Raises InputError when it has none."""
    source = open_source(SourceConfig(dataset))
    names = getattr(source, "classes", ())
    if not names:
        raise InputError(f"{dataset} has no classes: put the pictures of each class into a sub-folder of its own")
    if len(names) != cfg.classes:
        raise InputError(f"{dataset} has {len(names)} classes, these are {cfg.classes}-way networks; keep as many sub-folders")
    records, labels = labelled(source, dataset)
    told = projection(encoder(projection.backend)([r["image"] for r in records]))
    seen = thumbnails([r["image"] for r in records], cfg.features) if cfg.kind == "cnn" else told
    return tuple(names), Pictures(told, shown(cfg, seen, labels)[0], labels)


def read_pictures(donor: Donor, dataset: str, seed: int) -> Task:
    """Pictures of a folder with a sub-folder for each class, dealt to condition, selection and test at random.

    Raises InputError when the folder has no classes, or other numbers of them than the generator takes.
    """
    cfg: Any = donor.cfg
    if cfg.net is None:
        raise InputError(f"{donor.path} is told by words, not by pictures: give --task")
    names, found = look(dataset, Projection.load(donor.folder), cfg.net)
    told, x, labels = found.told, found.x, found.y
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(labels == c)) for c in range(len(names))]
    if empty := [name for name, own in zip(names, order, strict=True) if not len(own)]:
        raise InputError(f"{dataset}/{empty[0]} has no picture")
    shots = min(cfg.shots, *(len(own) for own in order))
    condition = np.zeros((1, len(names), cfg.shots, told.shape[1]), np.float32)
    for c, own in enumerate(order):
        condition[0, c, :shots] = told[own[:shots]]
    rest = [own[shots:] for own in order]
    deal = [np.concatenate([own[:shots] for own in order]), *(np.concatenate([own[i::2] for own in rest]) for i in (0, 1))]
    support, select, test = (Pictures(told[rows], x[rows], labels[rows]) for rows in deal)
    enough = min(len(own) for own in rest) >= 2
    return Task(names, condition, shots, support, select if enough else None, test if enough else None)


def read_words(donor: Donor, task: str) -> Task:
    """A task in words: embedded where the generator is told by text, else one of the zoo's. Chunks need none.

    Raises InputError for a generator told by pictures, and for a task the zoo has not.
    """
    cfg: Any = donor.cfg
    if isinstance(cfg, ReferenceConfig) or cfg.condition not in WORDS:
        raise InputError(f"{donor.path} is told by pictures: give --dataset, a folder with a sub-folder for each class")
    if cfg.condition == "chunk":
        if task:
            raise InputError(f"{donor.path} makes all chunks of a checkpoint and has no tasks: leave --task {task!r} out")
        return Task(("all chunks",), np.arange(cfg.labels, dtype=np.float32).reshape(-1, 1, 1, 1), 1)
    known = read_json(donor.folder / "tasks.json")["tasks"]
    if not task:
        raise InputError(f"give --task, such as {known[0]!r}: what the weights are for")
    if cfg.condition == "text":
        projection = Projection.load(donor.folder)
        return Task((task,), projection(text_encoder(projection.backend)([task])).reshape(1, 1, 1, -1), 1)
    if task not in known:
        raise InputError(f"no task {task!r} in the zoo{nearest(task, known)}; there are {', '.join(known[:10])}")
    return Task((task,), np.float32(known.index(task)).reshape(1, 1, 1, 1), 1)


def draw_weights(donor: Donor, task: Task, how: SampleConfig, n: int, seed: int) -> Drawn:
    """`n` networks; sample i of a seed is the same whatever n is, but for the reference."""
    if n < 1:
        raise InputError(f"-n {n}: draw 1 or more")
    cfg, items = donor.cfg, len(task.condition)
    params = load_params(donor, start(MeshConfig()))
    condition = np.tile(task.condition, (n, 1, 1, 1))
    there = np.broadcast_to(np.arange(cfg.shots) < task.shots, condition.shape[:3])
    key = jax.random.key(seed)
    if isinstance(cfg, ReferenceConfig):
        # Its sampler is its own: all steps, no guidance, and noise that depends on n.
        weights = reference.sample(donor.model, cfg, params["k"], params, jnp.asarray(condition[:, :, : task.shots]), key)
        samples = cfg.whole.padded(np.asarray(weights)[:, : cfg.whole.count])
        return Drawn(samples, samples.mean(0))
    rows = np.asarray(drawer(donor.model, cfg, how)(params, condition, there, key, np.arange(n * items)))
    samples = rows.reshape(n, items * rows.shape[1], -1)
    return Drawn(samples, samples.mean(0))


def labels_of(cfg: Any, tokens: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What networks [n, token, length] see in pictures x: [n, picture]."""
    params = cfg.whole.unflatten(jnp.asarray(tokens), cfg.whole.like)
    return predict(cfg.net, params, np.broadcast_to(x, (len(tokens), *x.shape)), at_once=50)


def trained_on(cfg: NetConfig, pictures: Pictures, seed: int) -> Any:
    """A network trained on these pictures alone, from scratch: a population of one."""
    model = net(cfg)
    begin = initial_population(model, 1, "random", jax.random.key(seed))
    return fit_population(
        model, begin, jnp.asarray(pictures.x[None]), jnp.asarray(pictures.y[None], jnp.int32), FEW[cfg.kind], jax.random.key(seed)
    )


def report(donor: Donor, task: Task, drawn: Drawn, how: SampleConfig, seed: int) -> dict[str, Any]:
    """Accuracies on what was left over, each named for what it is, beside baselines with a zoo and without; novelty, diversity, and
    whether the condition is used: None where all classes are told in no order."""
    cfg: Any = donor.cfg
    about: dict[str, Any] = {
        "classes": list(task.names),
        "condition": f"{task.shots}-shot, 0 gradient steps" if task.support else f"{cfg.condition}, 0 gradient steps",
        "seed": seed,
        # The reference takes all its steps, whatever is asked for.
        "sample": asdict(SampleConfig("ddpm", cfg.steps) if isinstance(cfg, ReferenceConfig) else how),
        "parameters": cfg.whole.count,
        "accuracy": None,
    }
    zoo = load_file(donor.folder / "neighbours.safetensors")
    rng, mine = np.random.default_rng(seed), _flat(cfg, drawn.samples)
    if isinstance(cfg, GeneratorConfig) and cfg.condition == "chunk":
        return about | {"novelty": _novelty(drawn.samples.reshape(-1, cfg.whole.length), zoo["weights"], rng)}
    about["novelty"] = _novelty(mine, zoo["weights"], rng)
    if cfg.net is None:
        known = read_json(donor.folder / "tasks.json")["tasks"]
        note = {} if task.names[0] in known else {"note": "the zoo has no task of these words: their embedding says what is made"}
        return about | note | {"distance to the task's own networks": _told_apart(donor, task, drawn, zoo, how, seed)}
    if task.support is None or task.select is None or task.test is None:
        return about | {"note": "no class has pictures left over, so nothing is known of these weights; add more pictures"}
    ways, y = len(task.names), task.test.y
    found = labels_of(cfg, drawn.samples, task.test.x)
    scores = accuracy(found, y, ways)
    chosen = int(accuracy(labels_of(cfg, drawn.samples, task.select.x), task.select.y, ways).argmax())
    turned = draw_weights(donor, replace(task, condition=np.roll(task.condition, 1, axis=1)), how, 1, seed).samples
    others = _zoo_baselines(donor, task, zoo, rng)
    alone = trained_on(cfg.net, task.support, seed)
    one: Any = {
        "single sample": scores.mean(),
        "weights averaged": accuracy(labels_of(cfg, drawn.mean[None], task.test.x), y, ways)[0],
        "best by selection set": scores[chosen],
        "best by test (oracle)": scores.max(),
        "pictures of the wrong classes": accuracy(labels_of(cfg, turned, task.test.x), y, ways)[0] if knows_order(cfg) else None,
        **{name: accuracy(labels_of(cfg, tokens, task.test.x), y, ways).mean() for name, tokens in others.items()},
        "prototype": head_accuracy(prototype(task.condition[:, :, : task.shots]), task.test.told[None], y[None])[0],
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


def knows_order(cfg: Any) -> bool:
    """Whether the condition says which class is which. Set Transformers do not, so the same classes in another order are the same to
    them; a linear prior beside them does."""
    if isinstance(cfg, ReferenceConfig):
        return cfg.encoder != "set"
    return bool(cfg.condition != "set" or cfg.prior == "linear")


def _zoo_baselines(donor: Donor, task: Task, zoo: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens [n, token, length] by name, of what the zoo gives without diffusion."""
    cfg, weights = donor.cfg, zoo["weights"]
    made = {"zoo mean": weights.mean(0)[None], "zoo networks + 0.04 noise": noisy(weights, 0.04, rng)[:50]}
    if "told" in zoo:  # class by class: a network for these classes in another order is of no use
        asked = task.condition[:, :, : task.shots].mean(2)
        made["nearest zoo network"] = nearest_model(asked.reshape(1, -1), zoo["told"].reshape(len(weights), -1), weights)
    found = {name: cfg.whole.padded(rows) for name, rows in made.items()}
    if isinstance(cfg, GeneratorConfig) and cfg.prior == "linear":
        there = np.broadcast_to(np.arange(cfg.shots) < task.shots, task.condition.shape[:3])
        params = load_params(donor, start(MeshConfig()))
        found["ridge"] = np.asarray(donor.model.apply(params, jnp.asarray(task.condition), there, method="expected"))
    return found


def _flat(cfg: Any, tokens: np.ndarray) -> np.ndarray:
    return flat(cfg.whole, tokens)


def _novelty(weights: np.ndarray, zoo: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Medians of the L2 distance to the nearest zoo network kept beside the generator: of samples, of these networks, of noisy ones."""
    found = {
        "generated": nearest_distance(weights, zoo),
        "zoo": nearest_distance(zoo, zoo, skip_self=True),
        "noise": nearest_distance(noisy(zoo, 0.04, rng), zoo),
    }
    return {name: float(np.median(distances)) for name, distances in found.items()} | {"of": len(zoo)}


def _told_apart(donor: Donor, task: Task, drawn: Drawn, zoo: dict[str, np.ndarray], how: SampleConfig, seed: int) -> Any:
    """Mean L2 distance of samples to the mean of the task's networks, and of samples told another task; None for a task not in the zoo."""
    known = read_json(donor.folder / "tasks.json")["tasks"]
    own = zoo["classes"][:, 0] == (known.index(task.names[0]) if task.names[0] in known else -1)
    if not own.any() or len(known) < 2:
        return None
    other = draw_weights(donor, read_words(donor, known[known.index(task.names[0]) - 1]), how, len(drawn.samples), seed)
    centre = zoo["weights"][own].mean(0)
    sets = {"told it": drawn.samples, "told another": other.samples}
    return {name: float(np.linalg.norm(_flat(donor.cfg, tokens) - centre, axis=1).mean()) for name, tokens in sets.items()}


def generate_folder(donor: Donor, args: Namespace) -> dict[str, Any]:
    """Draw `args.n` networks for the classes of `args.dataset`, or for `args.task` in words, and write them as weights folders, with
    `report.json`, into `args.out`.

    The flags left over are fields of `SampleConfig`. Raises InputError for data that does not fit and for an existing folder.
    """
    _check(donor)
    how = config.parse(SampleConfig(), args.flags, f"heirloom generate {donor.path}")
    _check_out(args.out, donor, args.dataset, args.force)
    if args.dataset and args.task:
        raise InputError("--dataset and --task both say what to make: give one")
    begun = time.perf_counter()
    task = read_pictures(donor, args.dataset, args.seed) if args.dataset else read_words(donor, args.task)
    drawn = draw_weights(donor, task, how, args.n, args.seed)
    check_finite(drawn, donor)
    about = report(donor, task, drawn, how, args.seed)
    chosen = {"mean": drawn.mean} if args.reduce == "mean" else {f"sample-{i:03d}": tokens for i, tokens in enumerate(drawn.samples)}
    with staged(args.out, force=args.force) as folder:
        folder.mkdir()
        for name, tokens in chosen.items():
            (folder / name).mkdir()
            _write(folder / name, donor, tokens, task)
        if task.support:
            Projection.load(donor.folder).save(folder)
        write_json(folder / "report.json", about)
    return about | {"folder": str(args.out), "weights": list(chosen), "seconds": round(time.perf_counter() - begun, 2)}


def _check_out(out: Path, donor: Donor, dataset: str | None, force: bool) -> None:
    """Raises InputError for a folder that exists, before anything is drawn, and for one that holds what is read."""
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out} exists; give another --out, or --force to replace it")
    for path in (donor.folder, *([Path(dataset)] if dataset else [])):
        if path.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out} holds {path}, which is read here, and --force would delete it: give another --out")


def check_finite(drawn: Drawn, donor: Donor) -> None:
    """Raises InputError for samples with NaN or infinity."""
    if len(bad := np.flatnonzero(~np.isfinite(drawn.samples).all((1, 2)))):
        numbers = listed(str(i) for i in bad)
        raise InputError(
            f"{len(bad)} of {len(drawn.samples)} samples of {donor.path} have NaN or infinity (numbers {numbers}): lower --guidance, or "
            "train the generator for longer"
        )


def _write(folder: Path, donor: Donor, tokens: np.ndarray, task: Task) -> None:
    """A network of ours as a weights folder; of a foreign checkpoint the tensors under their own names, of an adapter with its config."""
    cfg: Any = donor.cfg
    if cfg.net is None:
        tensors = cfg.whole.unflatten(tokens, cfg.whole.like)
        file = donor.folder / "adapter.json"
        if file.is_file():
            write_adapter(folder, tensors, read_json(file))
        else:
            save_file({path: np.ascontiguousarray(x) for path, x in tensors.items()}, folder / "model.safetensors")
        return
    write_params(folder, cfg.whole.unflatten(jnp.asarray(tokens), cfg.whole.like))
    write_config(folder, NETWORK.name, cfg.net)
    write_json(folder / "classes.json", {"classes": list(task.names), "features": "features.safetensors beside report.json"})


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Rows of `heirloom eval PATH --data DIR`: of a generator eight samples for these classes, every accuracy named for what it is; of a
    network it made, its accuracy on all pictures there are, those it was made from included where they lie there."""
    if not args.data:
        raise InputError("give --data: a folder with a sub-folder of pictures for each class")
    if donor.family.name == NETWORK.name:
        return [_evaluate_network(donor, args.data)]
    _check(donor)
    how = config.parse(SampleConfig(), args.flags, f"heirloom eval {donor.path}")
    task = read_pictures(donor, args.data, 0)
    if task.test is None:
        raise InputError(f"{args.data}: every class needs at least {task.shots + 2} pictures, to condition on, select by and test")
    drawn = draw_weights(donor, task, how, 8, 0)
    check_finite(drawn, donor)
    about = report(donor, task, drawn, how, 0)
    shared = {"dataset": args.data, "published": None, "n": about["test pictures"], "protocol": about["condition"]}
    return [shared | {"metric": name, "value": 100 * value} for name, value in about["accuracy"].items() if value is not None]


def _evaluate_network(donor: Donor, data: str) -> dict[str, Any]:
    cfg: Any = donor.cfg
    if not (donor.folder / "classes.json").is_file():
        raise InputError(f"{donor.path} has no classes.json: only networks that heirloom generate wrote say what their outputs are")
    names, found = look(data, Projection.load(donor.folder.parent), cfg)
    if (own := read_json(donor.folder / "classes.json")["classes"]) != list(names):
        raise InputError(f"{data} has the classes {', '.join(names)}; this network knows {', '.join(own)}")
    params = {path: jnp.asarray(np.asarray(view, np.float32))[None] for path, view in donor.source.values.items()}
    value = 100 * float(accuracy(predict(cfg, params, found.x[None]), found.y, cfg.classes)[0])
    return {"dataset": data, "published": None, "n": len(found.y), "protocol": "all pictures", "metric": "accuracy", "value": value}


def _check(donor: Donor) -> None:
    if donor.family.name not in (FAMILY.name, REFERENCE.name):
        raise InputError(f"{donor.path} is a {donor.family.name} model and generates nothing: name RUN/model of a generator recipe")

"""`heirloom generate PATH --dataset DIR`: weights for the classes of a folder of pictures, and a report that says how good they are."""

import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import config
from common.checkpoint.convert import Donor
from common.checkpoint.weights import staged, write_config, write_json, write_params
from common.data.sources import SourceConfig, open_source
from common.errors import InputError
from common.train.mesh import MeshConfig, start
from common.train.parameters import load_params
from weightgen.baselines import prototype
from weightgen.data import Projection, encoder
from weightgen.evaluate import disagreement, head_accuracy
from weightgen.formats import FAMILY, NETWORK
from weightgen.generator import GeneratorConfig, SampleConfig, drawer
from weightgen.nets import net
from weightgen.proof import few_shot_heads
from weightgen.zoo import FitConfig, head_tokens

FEW = FitConfig(steps=60, lr=0.1, weight_decay=0.1)


@dataclass(frozen=True)
class Task:
    """One data set: condition [1, class, shots, feature] with how many count, and what is left as (x, y) for selecting and testing.

    select, test are None where a class has no pictures left over.
    """

    names: tuple[str, ...]
    support: np.ndarray
    shots: int
    select: Any
    test: Any


@dataclass(frozen=True)
class Drawn:
    """Tokens [sample, class, feature + 1] of heads for the task's classes, and the averaged one."""

    samples: np.ndarray
    mean: np.ndarray


def read_task(donor: Donor, dataset: str, seed: int) -> Task:
    """Pictures of a folder with a sub-folder for each class, dealt to condition, selection and test at random.

    Raises InputError when the folder has no classes, or other numbers of them than the generator takes.
    """
    source = open_source(SourceConfig(dataset))
    names = getattr(source, "classes", ())
    if not names:
        raise InputError(f"{dataset} has no classes: put the pictures of each class into a sub-folder of its own")
    if len(names) != donor.cfg.net.classes:
        raise InputError(
            f"{dataset} has {len(names)} classes, this generator makes {donor.cfg.net.classes}-way heads; keep as many sub-folders"
        )
    projection = Projection.load(donor.folder)
    records = [source[i] for i in range(len(source))]
    labels = np.array([int(r["label"]) for r in records])
    x = projection(encoder(projection.backend)([r["image"] for r in records]))
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(labels == c)) for c in range(len(names))]
    if empty := [name for name, own in zip(names, order, strict=True) if not len(own)]:
        raise InputError(f"{dataset}/{empty[0]} has no picture")
    shots = min(donor.cfg.shots, *(len(own) for own in order))
    support = np.zeros((1, len(names), donor.cfg.shots, x.shape[1]), np.float32)
    for c, own in enumerate(order):
        support[0, c, :shots] = x[own[:shots]]
    rest = [own[shots:] for own in order]
    parts = [np.concatenate([own[i::2] for own in rest]) for i in (0, 1)]
    enough = min(len(own) for own in rest) >= 2
    select, test = ((x[rows][None], labels[rows][None]) if enough else None for rows in parts)
    return Task(tuple(names), support, shots, select, test)


def draw_weights(donor: Donor, task: Task, how: SampleConfig, n: int, seed: int) -> Drawn:
    """`n` heads; sample i of a seed is the same whatever n is."""
    if n < 1:
        raise InputError(f"-n {n}: draw 1 or more")
    cfg = donor.cfg
    params = load_params(donor, start(MeshConfig()))
    there = np.broadcast_to(np.arange(cfg.shots) < task.shots, (n, len(task.names), cfg.shots))
    draw = drawer(donor.model, cfg, how)
    samples = np.asarray(draw(params, np.repeat(task.support, n, axis=0), there, jax.random.key(seed), np.arange(n)))
    return Drawn(samples, samples.mean(0))


def report(donor: Donor, task: Task, drawn: Drawn, how: SampleConfig, seed: int) -> dict[str, Any]:
    """Accuracies on what was left over, each named for what it is, beside the baselines that need no zoo; diversity; shuffled condition."""
    about: dict[str, Any] = {
        "classes": list(task.names),
        "condition": f"{task.shots}-shot, 0 gradient steps",
        "seed": seed,
        "sample": asdict(how),
        "parameters": head_tokens(donor.cfg.net).count,
    }
    if task.test is None:
        return about | {
            "accuracy": None,
            "note": "no class has pictures left over, so nothing is known of these weights; add more pictures",
        }
    support = task.support[:, :, : task.shots]
    scores = head_accuracy(drawn.samples[:, None], *task.test)[:, 0]
    chosen = int(head_accuracy(drawn.samples[:, None], *task.select)[:, 0].argmax())
    turned = replace(task, support=np.roll(task.support, 1, axis=1))
    shuffled = draw_weights(donor, turned, how, 1, seed).samples
    labels = np.einsum("scf,ef->sec", drawn.samples, np.concatenate([task.test[0][0], np.ones((task.test[0].shape[1], 1))], 1)).argmax(-1)
    spec = head_tokens(donor.cfg.net)
    one: Any = {
        "single sample": scores.mean(),
        "weights averaged": head_accuracy(drawn.mean[None], *task.test)[0],
        "best by selection set": scores[chosen],
        "best by test (oracle)": scores.max(),
        "pictures of the wrong classes": head_accuracy(shuffled, *task.test)[0],
        "prototype": head_accuracy(prototype(support), *task.test)[0],
        "gradient descent on the pictures": head_accuracy(few_shot_heads(support, FEW, spec, donor.cfg.net), *task.test)[0],
        "chance": 1 / len(task.names),
    }
    about["accuracy"] = {name: round(float(value), 5) for name, value in one.items()}
    about["test pictures"] = int(task.test[1].size)
    about["selected"] = chosen
    about["disagreement"] = disagreement(labels) if len(labels) > 1 else None
    return about


def generate_folder(donor: Donor, args: Namespace) -> dict[str, Any]:
    """Draw `args.n` heads for the classes of `args.dataset` and write them as weights folders, with `report.json`, into `args.out`.

    The flags left over are fields of `SampleConfig`. Raises InputError for data that does not fit and for an existing folder.
    """
    _check(donor)
    how = config.parse(SampleConfig(), args.flags, f"heirloom generate {donor.path}")
    begun = time.perf_counter()
    task = read_task(donor, args.dataset, args.seed)
    drawn = draw_weights(donor, task, how, args.n, args.seed)
    about = report(donor, task, drawn, how, args.seed)
    model, spec = net(donor.cfg.net), head_tokens(donor.cfg.net)
    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in model.spec.items()}
    chosen = {"mean": drawn.mean} if args.reduce == "mean" else {f"sample-{i:03d}": tokens for i, tokens in enumerate(drawn.samples)}
    with staged(args.out, force=args.force) as folder:
        folder.mkdir()
        for name, tokens in chosen.items():
            (folder / name).mkdir()
            write_params(folder / name, spec.unflatten(jnp.asarray(tokens), like))
            write_config(folder / name, NETWORK.name, donor.cfg.net)
            write_json(folder / name / "classes.json", {"classes": list(task.names), "features": "features.safetensors beside report.json"})
        Projection.load(donor.folder).save(folder)
        write_json(folder / "report.json", about)
    return about | {"folder": str(args.out), "weights": list(chosen), "seconds": round(time.perf_counter() - begun, 2)}


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Rows of `heirloom eval PATH --data DIR`: eight samples for these classes, every accuracy named for what it is."""
    _check(donor)
    if not args.data:
        raise InputError("give --data: a folder with a sub-folder of pictures for each class")
    how = config.parse(SampleConfig(), args.flags, f"heirloom eval {donor.path}")
    task = read_task(donor, args.data, 0)
    if task.test is None:
        raise InputError(f"{args.data}: every class needs at least {task.shots + 2} pictures, to condition on, select by and test")
    about = report(donor, task, draw_weights(donor, task, how, 8, 0), how, 0)
    shared = {"dataset": args.data, "published": None, "n": about["test pictures"], "protocol": about["condition"]}
    return [shared | {"metric": name, "value": 100 * value} for name, value in about["accuracy"].items()]


def _check(donor: Donor) -> None:
    if donor.family.name != FAMILY.name or not isinstance(donor.cfg, GeneratorConfig):
        raise InputError(f"{donor.path} is a {donor.family.name} model and generates nothing: name RUN/model of a generator recipe")
    if donor.cfg.net.kind != "head":
        raise InputError(f"{donor.path} generates an {donor.cfg.net.kind}; from pictures by class this command makes heads")

"""`heirloom generate PATH`: weights for the classes of a folder of pictures, or for a task in words, and a report."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from heirloom.common import config
from heirloom.common.arguments import EVAL_OF_CLIPS, refuse
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.weights import write_config, write_params
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, staged, write_json
from weightgen.formats import D2NWG, GENERATOR, NETWORK
from weightgen.generator.sample import SampleConfig
from weightgen.metrics import accuracy
from weightgen.report import report
from weightgen.tasks import Task, draw_weights, read_dataset, read_pictures, read_words
from weightgen.zoo.adapter_config import write_adapter
from weightgen.zoo.data import Projection
from weightgen.zoo.foreign import listed
from weightgen.zoo.nets import predict

LARGEST_WEIGHT = 1e12  # a generated network with larger ones is none; sums of their squares fit into float32


def generate_folder(donor: Donor, args: Namespace) -> dict[str, Any]:
    """Draw `args.n` networks for `args.dataset`, or `args.task` in words, as weights folders in `args.out`.

    `report.json` is written next to them.

    The flags left over are fields of `SampleConfig`. Raises InputError for data that does not fit and for an existing
    folder.
    """
    check_generates(donor)
    how = config.parse(SampleConfig(), args.flags, f"heirloom generate {donor.path}")
    _check_out(args.out, donor, args.dataset, force=args.force)
    if args.dataset and args.task:
        raise InputError("--dataset and --task both say what to make: give one")
    begun = time.perf_counter()
    task = read_pictures(donor, args.dataset, args.seed) if args.dataset else read_words(donor, args.task)
    samples = draw_weights(donor, task, how, n=args.n, seed=args.seed)
    check_finite(samples, donor)
    about = report(donor, task, samples, how=how, seed=args.seed)
    chosen = {f"sample-{i:03d}": tokens for i, tokens in enumerate(samples)}
    if args.reduce == "mean":
        chosen = {"mean": samples.mean(0)}
    with staged(args.out, force=args.force) as folder:
        folder.mkdir()
        for name, tokens in chosen.items():
            (folder / name).mkdir()
            _write(folder / name, donor, tokens, task=task)
        if task.support:
            Projection.load(donor.folder).save(folder)
        write_json(folder / "report.json", about)
    return about | {"folder": str(args.out), "weights": list(chosen), "seconds": round(time.perf_counter() - begun, 2)}


def _check_out(out: Path, donor: Donor, dataset: str | None, force: bool) -> None:
    """Raise InputError for a folder that exists, before anything is drawn, and for one that holds the inputs."""
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out} exists; give another --out, or --force to replace it")
    for path in (donor.folder, *([Path(dataset)] if dataset else [])):
        if path.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out} holds {path}, which is read here, and --force would delete it: give another --out")


def check_finite(samples: np.ndarray, donor: Donor) -> None:
    """Raise InputError for samples with NaN or infinity, or so large that the report could not square them."""
    if len(bad := np.flatnonzero(~(np.abs(samples) < LARGEST_WEIGHT).all((1, 2)))):
        numbers = listed(str(i) for i in bad)
        which = f"{len(bad)} of {len(samples)} samples of {donor.path} (numbers {numbers})"
        said = f"{which} have NaN, infinity or weights above {LARGEST_WEIGHT:g}"
        raise InputError(f"{said}: lower --guidance, or train the generator for longer")


def _write(folder: Path, donor: Donor, tokens: np.ndarray, task: Task) -> None:
    """Write a network as a weights folder, a foreign checkpoint in its own names, or an adapter with config."""
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
    about = {"classes": list(task.names), "features": "features.safetensors beside report.json"}
    write_json(folder / "classes.json", about)


def evaluate_folder(donor: Donor, args: Namespace) -> list[dict[str, Any]]:
    """Compute the rows of `heirloom eval PATH --data DIR`, for a generator or a generated network.

    Of a generator: the accuracies of eight samples for these classes. Of a network: its accuracy on all pictures, those
    it was made from included where the folder has them.
    """
    if not args.data:
        raise InputError("give --data: a folder with a sub-folder of pictures for each class")
    refuse(args, "eval", EVAL_OF_CLIPS | {"split", "image"}, f"{donor.path} reads folders, and", "is for other models")
    if donor.family.name == NETWORK.name:
        return [_evaluate_network(donor, args.data)]
    check_generates(donor)
    how = config.parse(SampleConfig(), args.flags, f"heirloom eval {donor.path}")
    task = read_pictures(donor, args.data, 0)
    if task.test is None:
        raise InputError(f"{args.data}: a class needs {task.shots + 2} pictures: for the condition, selection and test")
    samples = draw_weights(donor, task, how, n=8, seed=0)
    check_finite(samples, donor)
    about = report(donor, task, samples, how=how, seed=0)
    shared = {"dataset": args.data, "published": None, "n": about["test pictures"], "protocol": about["condition"]}
    known = {name: value for name, value in about["accuracy"].items() if value is not None}
    return [shared | {"metric": name, "value": 100 * value} for name, value in known.items()]


def _evaluate_network(donor: Donor, data: str) -> dict[str, Any]:
    cfg: Any = donor.cfg
    if not (donor.folder / "classes.json").is_file():
        only = "only networks that heirloom generate wrote have the names of their outputs"
        raise InputError(f"{donor.path} has no classes.json: {only}")
    names, found = read_dataset(data, Projection.load(donor.folder.parent), cfg)
    if (own := read_json(donor.folder / "classes.json")["classes"]) != list(names):
        raise InputError(f"{data} has the classes {', '.join(names)}; this network knows {', '.join(own)}")
    params = {path: jnp.asarray(np.asarray(view, np.float32))[None] for path, view in donor.source.values.items()}
    value = 100 * float(accuracy(predict(cfg, params, found.x[None]), found.y, cfg.classes)[0])
    about = {"dataset": data, "published": None, "n": len(found.y), "protocol": "all pictures"}
    return about | {"metric": "accuracy", "value": value}


def check_generates(donor: Donor) -> None:
    """Raise InputError for a model that is no generator of weights."""
    if donor.family.name not in (GENERATOR.name, D2NWG.name):
        raise InputError(
            f"{donor.path} is a {donor.family.name} model and generates nothing: name RUN/model of a generator recipe"
        )

"""The verbs of the `heirloom` command. Heavy imports are inside the functions."""

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from heirloom.common.errors import InputError, nearest
from heirloom.common.methods import ability, able, locate_any, method_of, open_any

RECIPE_VERBS = {
    "train": "train",
    "inherit": "inherit",
    "eval": "evaluate",
    "inspect": "describe",
    "cache": "cache",
    "compile": "abstract",
}
"""The method of a recipe that each verb calls; a recipe may lack some."""


def doctor(args: argparse.Namespace) -> None:
    from heirloom.common.doctor import examine

    _write_json(args, examine([ability(method, "doctor") for method in able("doctor")]))


def demo(args: argparse.Namespace) -> None:
    demo = ability(args.method, "demo")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: cannot write results here ({error.strerror}); choose another --out") from error
    _write_json(args, demo(args.seed, args.out))
    print("other demos: " + ", ".join(f"heirloom demo {name}" for name in able("demo") if name != args.method))


def convert(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from heirloom.common.checkpoint.convert import convert
    from heirloom.common.checkpoint.pipeline import is_pipeline
    from heirloom.common.checkpoint.quantization import quantize_folder

    if args.quantize and args.to != "heirloom":
        raise InputError(f"--quantize {args.quantize} writes a folder of heirloom; leave out --to {args.to}")
    if is_pipeline(locate_any(args.source)):
        _convert_pipeline(args)
        return
    donor, how = open_any(args.source, **_settings(args.set)), {"force": args.force, "verify": args.verify}
    if args.quantize:
        check = quantize_folder(donor, args.destination, **how)
    else:
        check = convert(donor, args.destination, args.to, **how)
    _write_json(args, asdict(check))
    to = args.quantize or args.to
    print(f"{args.destination}: {donor.family.name} from {donor.format} to {to}; {check.sentence()}")


def _convert_pipeline(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from heirloom.common.checkpoint.pipeline import convert_pipeline

    if args.set:
        instead = f"convert one of its sub-folders with --set {args.set[0]}"
        raise InputError(f"--set does not apply to a whole pipeline: {instead}")
    checks = convert_pipeline(
        locate_any(args.source),
        args.destination,
        args.to,
        lambda part: open_any(str(part)),
        force=args.force,
        quantize=args.quantize,
        verify=args.verify,
    )
    _write_json(args, {name: asdict(check) for name, check in checks.items()})
    for name, check in checks.items():
        print(f"{args.destination}/{name}: {check.sentence()}")


def inspect(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from heirloom.common import config
    from heirloom.common.checkpoint.convert import describe
    from heirloom.common.checkpoint.quantization import sentence, sizes
    from heirloom.common.nn.functional import functional
    from heirloom.common.surgery.report import print_model

    record = size = None
    if config.is_recipe(args.what):
        family, cfg = _recipe(args.what, "describe").describe()
        spec = functional(family.module, cfg).spec
    else:
        donor = open_any(args.what)
        family, cfg, spec, record = donor.family, donor.cfg, donor.source.spec, describe(donor.folder)
        size = sizes(donor)
    counts, macs = family.parameters(spec), family.macs(cfg, spec)
    print_model(spec, counts, macs, record, [sentence(size)] if size else ())
    about = {"method": family.name, "config": asdict(cfg), "parameters": counts, "macs": macs, "provenance": record}
    _write_json(args, about | {"file": size})


def inherit(args: argparse.Namespace) -> None:
    record = _recipe(args.config, "inherit", args.flags).inherit(args.destination, force=args.force)
    _write_json(args, record)
    print(f"{args.destination}: {record['fraction']:.1%} of the parameters come from {record['source']}")


def cache(args: argparse.Namespace) -> None:
    if args.destination.exists():
        raise InputError(f"{args.destination} exists; give another name, or remove it")
    about = _recipe(args.config, "cache", args.flags).cache(args.destination)
    _write_json(args, about)
    by = " and ".join(about[name] for name in ("teacher", "autoencoder", "text_encoder") if name in about)
    print(f"{args.destination}: {about['records']:,} records encoded by {by}")


def index(args: argparse.Namespace) -> None:
    import time

    from rich.progress import Progress

    from heirloom.common.data.catalogue import catalogued, missing
    from heirloom.common.data.sources import SourceConfig
    from heirloom.common.data.sources.resolve import shards_of

    if not (shards := shards_of(SourceConfig(args.data))):
        raise InputError(f"{args.data} has no tar shards, and other data needs no index")
    began, new = time.monotonic(), len(missing(shards))
    with Progress(transient=True) as progress:
        task = progress.add_task("indexing", total=new)
        found = catalogued(shards, lambda: progress.advance(task))
    seconds, samples = time.monotonic() - began, int(found.samples.sum())
    about = {"shards": len(shards), "samples": samples, "indexed": new, "seconds": round(seconds, 2)}
    _write_json(args, about)
    print(f"{args.data}: {len(shards):,} shards, {samples:,} samples; {new:,} shards indexed in {seconds:.1f} s")


def recipes(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from heirloom.common import config

    if not (found := config.summaries(args.start)):
        near = nearest(args.start, config.recipes())
        raise InputError(f"no recipe starts with {args.start!r}{near}; heirloom recipes lists all")
    out = Table(box=None, pad_edge=False, show_header=False)
    out.add_column(no_wrap=True)
    for name, text in found.items():
        out.add_row(name, text)
    Console().print(out, highlight=False)
    print("\nfields of one: heirloom train RECIPE --help; outline of its model: heirloom inspect RECIPE")
    _write_json(args, found)


def train(args: argparse.Namespace) -> None:
    import jax

    from heirloom.common.paths import Address
    from heirloom.common.train.bucket import in_bucket
    from heirloom.common.train.loop import closing

    recipe = _recipe(args.config, "train", args.flags)
    with in_bucket(args.run) if isinstance(args.run, Address) else nullcontext(args.run) as folder:
        recipe.train(folder)
        last = closing(folder, str(args.run))
    if last and jax.process_index() == 0:
        print(last)


def supervise(args: argparse.Namespace) -> None:
    from heirloom.common.supervise import supervise

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise InputError("give the command after --, such as heirloom supervise -- heirloom train RECIPE --run DIR")
    if args.tries < 1 or args.pause < 0:
        raise InputError(f"--tries {args.tries} and --pause {args.pause:g}: give 1 or more, and 0 or more seconds")
    ended = supervise(command, args.tries, args.pause)
    print(f"heirloom supervise: {ended.why}")
    if ended.code:
        raise SystemExit(ended.code)


def compile(args: argparse.Namespace) -> None:
    from heirloom.common import compile

    topology = compile.Topology.parse(args.topology)
    result = compile.compile_for(_recipe(args.config, "abstract", args.flags), topology)
    print("\n".join(compile.lines(args.config, result)))
    _write_json(args, result)


def eval(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from heirloom.common import config
    from heirloom.common.arguments import arguments_of, refuse

    if config.is_recipe(args.what):
        options = {argument.name for argument in arguments_of("eval")} - {"what"}
        its_data = f"{args.what} is a recipe, which has its own data (--held-out.path), and"
        refuse(args, "eval", options, its_data, "is for weights")
        rows = _recipe(args.what, "evaluate", args.flags).evaluate()
    else:
        donor = open_any(args.what)
        if args.beside and not args.suite:
            raise InputError("--beside needs --suite DIR")
        if args.suite:
            rows = ability(method_of(donor), "suite")(donor, open_any(args.beside) if args.beside else None, args)
        else:
            rows = ability(method_of(donor), "evaluate")(donor, args)
    out = Table(box=None, pad_edge=False)
    protocol, compared = (any(name in row for row in rows) for name in ("protocol", "beside"))
    second = (Path(args.beside).name,) if compared else ()
    for header in ("dataset", "metric", "value", *second, "published", "n", *(("protocol",) if protocol else ())):
        out.add_column(header, justify="left" if header in ("dataset", "metric", "protocol") else "right")
    for row in rows:
        shown = ("value", *(("beside",) if compared else ()), "published")
        numbers = ["" if row.get(name) is None else f"{row[name]:.4g}" for name in shown]
        how = (row["protocol"],) if protocol else ()
        out.add_row(row["dataset"], row["metric"], *numbers, f"{row['n']:,}", *how)
    Console().print(out)
    for name in dict.fromkeys(row["published_of"] for row in rows if "published_of" in row):
        print(f"published: {name}")
    _write_json(args, {"rows": rows})


def sample(args: argparse.Namespace) -> None:
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it then
    donor = open_any(args.what)
    drawn = ability(method_of(donor), "sample")(donor, args)
    _write_json(args, drawn)
    print(f"{drawn['picture']}: {drawn['count']} pictures in {drawn['seconds']:.1f} s, compilation included")


def expand(args: argparse.Namespace) -> None:
    donor = open_any(args.gene)
    record = ability(method_of(donor), "expand")(donor, args)
    _write_json(args, record)
    print(
        f"{args.destination}: {args.depth} layers, {record['fraction']:.1%} of the parameters come from"
        f" {record['source']}"
    )


def compare(args: argparse.Namespace) -> None:
    _by_the_method_that_has(args, "compare")


def rank(args: argparse.Namespace) -> None:
    _by_the_method_that_has(args, "rank")


def explore(args: argparse.Namespace) -> None:
    _by_the_method_that_has(args, "explore")


def generate(args: argparse.Namespace) -> None:
    donor = open_any(args.what)
    made = ability(method_of(donor), "generate")(donor, args)
    _write_json(args, made)
    for name, value in ((name, value) for name, value in (made["accuracy"] or {}).items() if value is not None):
        print(f"{name:<34}{100 * value:6.1f} %")
    count = len(made["weights"])
    print(f"{made['folder']}: {count} weights folder{'s' if count > 1 else ''} and report.json; {made['condition']}")


def push(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from heirloom.common.checkpoint.pipeline import is_pipeline
    from heirloom.common.push import push, repository

    repository(args.destination)  # before the folder is opened
    if not args.folder.is_dir():
        raise InputError(f"{args.folder}: no such folder; give a weights folder, or a run folder")
    donor = open_any(str(args.folder))
    folder = args.folder if is_pipeline(args.folder) else donor.folder
    how = {"private": args.private, "license": args.license, "dry_run": args.dry_run}
    pushed = push(folder, donor, args.destination, **how)
    _write_json(args, asdict(pushed))
    for name, size in pushed.files.items():
        print(f"{size / 1e6:10,.2f} MB  {name}")
    print(f"{pushed.commit}" if pushed.commit else f"nothing was uploaded; without --dry-run it goes to {pushed.url}")


def report(args: argparse.Namespace) -> None:
    from heirloom.common.report import write

    print(write(args.run, args.out))


def _by_the_method_that_has(args: argparse.Namespace, verb: str) -> None:
    if not (found := able(verb)):
        raise InputError(f"no installed method has the verb {verb}")
    _write_json(args, ability(found[0], verb)(args))


def _write_json(args: argparse.Namespace, value: Any) -> None:
    if args.json:
        from heirloom.common.files import staged, write_json

        with staged(args.json, force=True) as file:
            write_json(file, value)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Parses `NAME=VALUE` settings; digits become ints."""
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"--set {pair}: write NAME=VALUE, such as heads=6")
    return {
        name: int(value) if value.isdigit() else value for name, _, value in (pair.partition("=") for pair in pairs)
    }


def _recipe(name: str, verb: str, flags: Sequence[str] = ()) -> Any:
    """Loads a recipe for a verb. Raises InputError when the recipe lacks the method that the verb calls."""
    from heirloom.common import config

    wanted = next((name for name, call in RECIPE_VERBS.items() if call == verb), verb)
    recipe = config.load(name, flags, wanted)
    if not hasattr(recipe, verb):
        has = ", ".join(f"heirloom {able}" for able, call in RECIPE_VERBS.items() if hasattr(recipe, call))
        raise InputError(f"{name}: this recipe has no heirloom {wanted}; it has {has}")
    return recipe

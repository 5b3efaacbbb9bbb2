"""The `heirloom` command. Nothing heavy is imported before a verb is known; every mistake of the user is one line and exit code 2."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from heirloom.common.errors import InputError, Remark, VerificationError, nearest
from heirloom.common.paths import local

MENDABLE, FAILED, INTERRUPTED = 2, 1, 130


def methods() -> dict[str, Any]:
    """The installed methods by name: the modules behind the entry point `heirloom.methods`."""
    found = {point.name: point for point in entry_points(group="heirloom.methods")}
    if not found:
        raise InputError("no method is installed: run pip install -e . in the repository")
    return {name: point.load() for name, point in sorted(found.items())}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 a verification failed, 2 something the user can mend, 130 interrupted.

    A training that was asked to stop exits with 75: the same command continues it.
    """
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        """Remarks as lines of the command, each once; other warnings as Python prints them."""
        if not issubclass(category, Remark):
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
        elif str(message) not in said:
            said.add(str(message))
            print(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", Remark)
        warnings.showwarning = show  # type: ignore[assignment]
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        for text in sys.argv[1:] if argv is None else argv:
            local(text)
        parser = _parser()
        args, rest = parser.parse_known_args(argv)
        if rest and not _takes_flags(args):
            hint = nearest(rest[0], _options(parser, args.verb))
            raise InputError(f"unknown argument {rest[0]!r}{hint}; see heirloom {args.verb} --help")
        args.flags = rest
        args.run_verb(args)
    except InputError as error:
        print(f"heirloom: {error}", file=sys.stderr)
        return MENDABLE
    except VerificationError as error:
        print(f"heirloom: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("heirloom: interrupted; what was not complete is not there", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has enough (`heirloom inspect ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # the disk and the rights on it are the user's
        where = f"{error.filename}: " if error.filename else ""
        print(f"heirloom: {where}{error.strerror or error}", file=sys.stderr)
        return MENDABLE
    return 0


def _takes_flags(args: argparse.Namespace) -> bool:
    """Whether fields of a recipe, or of what a method does with weights, may follow."""
    return args.verb in ("train", "eval", "sample", "compare", "generate", "cache", "compile")


class _Parser(argparse.ArgumentParser):
    """argparse's own complaint is two paragraphs; ours is one line."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="heirloom", description="Small models inherit from big ones, in JAX.")
    parser.add_argument("--version", action="version", version=f"heirloom {version('heirloom-jax')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, run: Any, help: str, *, json: bool = False) -> argparse.ArgumentParser:
        # Flags of recipes are passed through, so an abbreviation here could swallow one.
        sub = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run_verb=run)
        if json:
            sub.add_argument("--json", type=Path, metavar="FILE", help="write the result as data, too")
        return sub

    verb("doctor", _doctor, "versions, backend, devices, a matmul; what to type to fix what is wrong", json=True)

    sub = verb("demo", _demo, "the main job of a method on embedded real data, in minutes on a CPU", json=True)
    sub.add_argument("method", nargs="?", default="tinyclip")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, default=Path("heirloom-demo"), metavar="DIR", help="where the picture goes")

    sub = verb("convert", _convert, "between our weights folders and the formats of others, verified", json=True)
    sub.add_argument("source", metavar="SOURCE", help="hf:org/name[@revision], a folder, a .safetensors, .pt or .bin, or embedded:NAME")
    sub.add_argument("destination", metavar="DEST", type=Path)
    sub.add_argument("--to", default="heirloom", metavar="FORMAT", help="heirloom, hf, open_clip, original, ... (default: heirloom)")
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="what bare weights cannot tell: heads, activation")
    sub.add_argument("--no-verify", dest="verify", action="store_false", help="skip the comparison with the reference")
    sub.add_argument("--force", action="store_true", help="replace DEST")

    sub = verb("inspect", _inspect, "config, parameter and MAC counts, axes with sizes, provenance", json=True)
    sub.add_argument("what", metavar="PATH|CONFIG")

    sub = verb("inherit", _inherit, "the student of a recipe cut from its donor, without training", json=True)
    sub.add_argument("config", metavar="CONFIG")
    sub.add_argument("destination", metavar="DEST", type=Path)
    sub.add_argument("--force", action="store_true", help="replace DEST")

    sub = verb("cache", _cache, "a teacher's embeddings of a recipe's data, stored once (then --teacher cache:DEST)", json=True)
    sub.add_argument("config", metavar="CONFIG")
    sub.add_argument("destination", metavar="DEST", type=Path)

    sub = verb("train", _train, "run a recipe; the same command again resumes; every field is a flag (--optim.lr 3e-4)")
    sub.add_argument("config", metavar="CONFIG")
    sub.add_argument("--run", type=Path, required=True, metavar="DIR", help="the folder of the run")

    sub = verb("compile", _compile, "the train step of a recipe for a TPU pod, on any machine: memory, collectives, limits", json=True)
    sub.add_argument("config", metavar="CONFIG")
    sub.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:16x16, v5p:4x4x4, v6e:8x8, ...")

    sub = verb("eval", _eval, "score weights, or the student of a recipe as it starts", json=True)
    sub.add_argument("what", metavar="PATH|CONFIG")
    sub.add_argument("--data", help="emoji (default for a CLIP), a folder, .csv, .tar, .parquet, tfds:NAME; an .npz of the ADM suite")
    sub.add_argument("--split", default="", help="train, test, ... where the data has splits (emoji: test)")
    sub.add_argument("--image", default="image", metavar="COLUMN", help="where the pictures are (default: image)")
    sub.add_argument("--text", default="caption", metavar="COLUMN", help="where the captions are (default: caption)")
    sub.add_argument("--task", choices=("retrieval", "zeroshot"), default="retrieval")
    sub.add_argument("--suite", type=Path, metavar="DIR", help="every data set of a folder, published numbers beside (CLIPs)")
    sub.add_argument("--beside", metavar="SOURCE", help="another model on the same suite, such as the teacher")
    sub.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line, in label order, or imagenet (zeroshot)")
    sub.add_argument("--templates", type=Path, metavar="FILE", help="templates with {}, one a line, or imagenet (zeroshot)")

    sub = verb("sample", _sample, "draw pictures of classes, as a grid; how is a flag (--steps 50, --guidance 4)", json=True)
    sub.add_argument("what", metavar="PATH", help="a DiT or LiT by SOURCE")
    sub.add_argument("--class", dest="classes", type=int, nargs="+", metavar="N", help="classes to draw (default: the first eight)")
    sub.add_argument("--count", type=int, default=4, metavar="N", help="pictures of each class")
    sub.add_argument("--out", type=Path, default=Path("samples.png"), metavar="FILE", help="where the grid goes")
    sub.add_argument("--autoencoder", metavar="SOURCE", help="the decoder of a latent model")
    sub.add_argument("--seed", type=int, default=0)

    sub = verb("expand", _expand, "a model of any depth from a gene", json=True)
    sub.add_argument("gene", metavar="GENE", help="a gene, or another ViT, by SOURCE")
    sub.add_argument("destination", metavar="DEST", type=Path)
    sub.add_argument("--depth", type=int, required=True, metavar="N", help="layers of the result")
    sub.add_argument("--map", default="", metavar="0,0,1,...", help="the gene's block for each layer (default: spread evenly, in order)")
    sub.add_argument("--size", type=int, metavar="PIXELS", help="another resolution: positions are resampled")
    sub.add_argument("--classes", type=int, metavar="N", help="another number of classes: a fresh head")
    sub.add_argument("--seed", type=int, default=0, help="of what is fresh")
    sub.add_argument("--force", action="store_true", help="replace DEST")

    sub = verb("compare", _compare, "ways to start models of several depths: accuracy against cost, in one table", json=True)
    sub.add_argument("what", nargs="?", metavar="CONFIG")
    sub.add_argument("--run", type=Path, metavar="DIR", help="where the runs go; the same command again resumes")
    sub.add_argument("--cost", metavar="6-15", help="only the ratios of storage and training for these depths, by formula; needs no CONFIG")

    sub = verb("generate", _generate, "weights for the classes of a data set or a task in words; how is a flag (--steps 50)", json=True)
    sub.add_argument("what", metavar="PATH", help="a generator by SOURCE: RUN/model of a generator recipe")
    sub.add_argument("--dataset", metavar="DIR", help="a folder with a sub-folder of pictures for each class")
    sub.add_argument("--task", default="", metavar="WORDS", help="what the weights are for, where no pictures say it")
    sub.add_argument("-n", type=int, default=8, metavar="N", help="how many to draw (default: 8)")
    sub.add_argument("--reduce", choices=("none", "mean"), default="none", help="mean: write the average of all instead of each")
    sub.add_argument("--out", type=Path, default=Path("generated"), metavar="DIR", help="where the weights folders and report.json go")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--force", action="store_true", help="replace what is there")

    sub = verb("report", _report, "the curves and pictures of a run as one HTML page")
    sub.add_argument("run", type=Path, metavar="RUN")
    return parser


def _options(parser: argparse.ArgumentParser, verb: str) -> list[str]:
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(subparsers.choices[verb]._option_string_actions)


def _write_json(args: argparse.Namespace, value: Any) -> None:
    if args.json:
        from heirloom.common.checkpoint.staging import staged
        from heirloom.common.checkpoint.weights import write_json

        with staged(args.json, force=True) as file:
            write_json(file, value)


def _families() -> list[Any]:
    return [family for method in methods().values() for family in method.families()]


def _method_of(donor: Any) -> str:
    return next(name for name, method in methods().items() if donor.family in method.families())


def _ask(name: str, verb: str) -> Any:
    """What a method says to a verb. Raises InputError for an unknown method, or one that has nothing to say."""
    found = methods()
    if name not in found:
        raise InputError(f"no method {name!r}{nearest(name, found)} (installed: {', '.join(found)})")
    if not hasattr(found[name], verb):
        raise InputError(f"{name} has no {verb}; {', '.join(m for m in found if hasattr(found[m], verb)) or 'no installed method'} has")
    return getattr(found[name], verb)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` from the command line, numbers as numbers."""
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"--set {pair}: write NAME=VALUE, such as heads=6")
    return {name: int(value) if value.isdigit() else value for name, _, value in (pair.partition("=") for pair in pairs)}


def _open(source: str, **overrides: Any) -> Any:
    """A checkpoint by SOURCE: the run folders we write count as their model."""
    from heirloom.common.checkpoint.convert import open_donor
    from heirloom.common.checkpoint.hub import locate

    families = _families()
    path = locate(source, {name: path for family in families for name, path in family.embedded.items()})
    return open_donor(path / "model" if (path / "metrics.jsonl").is_file() else path, families, **overrides)


def _doctor(args: argparse.Namespace) -> None:
    from heirloom.common.doctor import examine

    _write_json(args, examine([method.doctor for method in methods().values() if hasattr(method, "doctor")]))


def _demo(args: argparse.Namespace) -> None:
    demo = _ask(args.method, "demo")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.out}: cannot hold the results ({error.strerror}); choose another --out") from error
    _write_json(args, demo(args.seed, args.out))


def _convert(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from heirloom.common.checkpoint.convert import convert

    donor = _open(args.source, **_settings(args.set))
    check = convert(donor, args.destination, args.to, force=args.force, verify=args.verify)
    _write_json(args, asdict(check))
    print(f"{args.destination}: {donor.family.name} from {donor.format} to {args.to}; {check.sentence()}")


def _inspect(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from heirloom.common import config
    from heirloom.common.checkpoint.convert import describe
    from heirloom.common.nn.functional import functional
    from heirloom.common.surgery.report import table

    record = None
    if config.is_recipe(args.what):
        family, cfg = config.load(args.what).describe()
        spec = functional(family.module, cfg).spec
    else:
        donor = _open(args.what)
        family, cfg, spec, record = donor.family, donor.cfg, donor.source.spec, describe(donor.folder)
    counts, macs = family.parameters(spec), family.macs(cfg, spec)
    console = Console()
    console.print(table(spec, record))
    console.print(", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items()) + f" parameters; {macs / 1e9:.2f} GMACs")
    if record:
        console.print(f"inherited {record['fraction']:.1%} from {record['source']}", soft_wrap=True)
    _write_json(args, {"method": family.name, "config": asdict(cfg), "parameters": counts, "macs": macs, "provenance": record})


def _inherit(args: argparse.Namespace) -> None:
    from heirloom.common import config

    record = config.load(args.config).inherit(args.destination, force=args.force)
    _write_json(args, record)
    print(f"{args.destination}: {record['fraction']:.1%} of the parameters come from {record['source']}")


def _cache(args: argparse.Namespace) -> None:
    from heirloom.common import config

    recipe = config.load(args.config, args.flags)
    if not hasattr(recipe, "cache"):
        raise InputError(f"{args.config}: this method keeps no embeddings of a teacher")
    about = recipe.cache(args.destination)
    _write_json(args, about)
    print(f"{args.destination}: embeddings of {about['records']:,} records by {about['teacher']}")


def _train(args: argparse.Namespace) -> None:
    from heirloom.common import config

    config.load(args.config, args.flags).train(args.run)


def _compile(args: argparse.Namespace) -> None:
    from heirloom.common import compile, config

    topology = compile.Topology.parse(args.topology)
    result = compile.compile_for(config.load(args.config, args.flags), topology)
    print("\n".join(compile.lines(args.config, result)))
    _write_json(args, result)


def _eval(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from heirloom.common import config

    if config.is_recipe(args.what):
        given = {"--data": args.data, "--split": args.split, "--classes": args.classes, "--templates": args.templates}
        given |= {"--suite": args.suite, "--beside": args.beside}
        if name := next((name for name, value in given.items() if value), None):
            raise InputError(f"{name} goes with weights; a recipe names its own data (--held-out.path)")
        rows = config.load(args.what, args.flags).evaluate()
    else:
        donor = _open(args.what)
        if args.beside and not args.suite:
            raise InputError("--beside goes with --suite DIR")
        if args.suite:
            rows = _ask(_method_of(donor), "suite")(donor, _open(args.beside) if args.beside else None, args)
        else:
            rows = _ask(_method_of(donor), "evaluate")(donor, args)
    out = Table(box=None, pad_edge=False)
    protocol, beside = (any(name in row for row in rows) for name in ("protocol", "beside"))
    second = (Path(args.beside).name,) if beside else ()
    for header in ("dataset", "metric", "value", *second, "published", "n", *(("protocol",) if protocol else ())):
        out.add_column(header, justify="left" if header in ("dataset", "metric", "protocol") else "right")
    for row in rows:
        numbers = ["" if row.get(name) is None else f"{row[name]:.4g}" for name in ("value", *(("beside",) if beside else ()), "published")]
        how = (row["protocol"],) if protocol else ()
        out.add_row(row["dataset"], row["metric"], *numbers, f"{row['n']:,}", *how)
    Console().print(out)
    for name in dict.fromkeys(row["published_of"] for row in rows if "published_of" in row):
        print(f"published: {name}")
    _write_json(args, {"rows": rows})


def _sample(args: argparse.Namespace) -> None:
    donor = _open(args.what)
    drawn = _ask(_method_of(donor), "sample")(donor, args)
    _write_json(args, drawn)
    print(f"{drawn['picture']}: {len(drawn['labels'])} pictures in {drawn['seconds']:.1f} s, compilation included")


def _expand(args: argparse.Namespace) -> None:
    donor = _open(args.gene)
    record = _ask(_method_of(donor), "expand")(donor, args)
    _write_json(args, record)
    print(f"{args.destination}: {args.depth} layers, {record['fraction']:.1%} of the parameters come from {record['source']}")


def _compare(args: argparse.Namespace) -> None:
    able = [method for method in methods().values() if hasattr(method, "compare")]
    if not able:
        raise InputError("no installed method has compare")
    _write_json(args, able[0].compare(args))


def _generate(args: argparse.Namespace) -> None:
    donor = _open(args.what)
    made = _ask(_method_of(donor), "generate")(donor, args)
    _write_json(args, made)
    for name, value in ((name, value) for name, value in (made["accuracy"] or {}).items() if value is not None):
        print(f"{name:<34}{100 * value:6.1f} %")
    count = len(made["weights"])
    print(f"{made['folder']}: {count} weights folder{'s' if count > 1 else ''} and report.json; {made['condition']}")


def _report(args: argparse.Namespace) -> None:
    from heirloom.common.report import write

    print(write(args.run))


if __name__ == "__main__":
    sys.exit(main())

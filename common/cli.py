"""The `heirloom` command. Nothing heavy is imported before a verb runs; bad input is one line and exit code 2."""

import argparse
import contextlib
import io
import os
import pkgutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from types import FrameType
from typing import Any

from heirloom.common import verbs
from heirloom.common.argument import Verb, destination
from heirloom.common.arguments import VERBS
from heirloom.common.errors import (
    TO_STOP,
    Exit,
    InputError,
    Remark,
    Stopped,
    VerificationError,
    nearest,
    stop_if_asked,
)
from heirloom.common.paths import FIELDS, is_address, local, without_file


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code, one of `Exit` or that of the command that it supervises."""
    with notes():
        try:
            code = _main(argv)
        except Exception:
            if liveness := sys.modules.get("heirloom.common.train.liveness"):
                liveness.wait_for_failure_of_others()
            raise
        _leave(code, "see its own output")
        return code


def script(name: str, run: Callable[[], None]) -> int:
    """Runs a script of `scripts/` as a verb runs: remarks are notes, and bad input is one line and exit code 2."""
    try:
        with notes():
            run()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return Exit.BAD_INPUT
    return Exit.DONE


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Prints remarks as notes in the block."""
    said: set[str] = set()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        """Prints each remark once as a line `note: ...`, and other warnings as Python does."""
        if not issubclass(category, Remark):
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
        elif str(message) not in said:
            said.add(str(message))
            print(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", Remark)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Lets SIGTERM end a command like Ctrl-C does, with exit code 75; a training handles it itself while it runs."""
    mine = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != mine:  # a process that was forked from this one
            os.kill(os.getpid(), number)
        why = "stopped by SIGTERM; incomplete results were removed, and the same command begins or continues"
        TO_STOP.append(Stopped(why))
        stop_if_asked()

    handles = threading.current_thread() is threading.main_thread()
    if not handles or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
        stop_if_asked()
    finally:
        TO_STOP.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(code: int, why: str) -> None:
    """Tells the other processes of a job, if there are any, that this one ends."""
    if liveness := sys.modules.get("heirloom.common.train.liveness"):
        liveness.leave(code, why)


def _main(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        argv = [without_file(text) for text in argv]
        _help_of_recipe(argv)
        parser = _parser()
        try:
            args, rest = parser.parse_known_args(argv)
        except SystemExit:  # the help of a verb was printed
            _help_of_settings(argv)
            raise
        verb = next(verb for verb in VERBS if verb.name == args.verb)
        if rest and not verb.flags:
            options = [name for argument in verb.arguments for name in argument.names] + (
                ["--json"] if verb.json else []
            )
            raise InputError(
                f"unknown argument {rest[0]!r}{nearest(rest[0], options)}; see heirloom {args.verb} --help"
            )
        _refuse_addresses(verb, args, rest)
        args.flags = rest
        with _terminated():
            getattr(verbs, args.verb)(args)
    except InputError as error:
        print(f"heirloom: {error}", file=sys.stderr)
        _leave(Exit.BAD_INPUT, str(error))
        return Exit.BAD_INPUT
    except Stopped as stopped:
        print(stopped, end="\n" if str(stopped) else "")  # the first process of a job says it
        return Exit.STOPPED
    except VerificationError as error:
        print(f"heirloom: {error}", file=sys.stderr)
        return Exit.FAILED
    except KeyboardInterrupt:
        print("heirloom: interrupted; incomplete results were removed", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:  # the program that reads our output has closed it (`heirloom inspect ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # disk and permission errors: the user can correct them
        where = f"{error.filename}: " if error.filename else ""
        print(f"heirloom: {where}{error.strerror or error}", file=sys.stderr)
        return Exit.BAD_INPUT
    return 0


def _refuse_addresses(verb: Verb, args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Raises InputError for the first address (gs://, ...) where the verb takes none."""
    for argument in verb.arguments:
        value = getattr(args, argument.name)
        for text in value if isinstance(value, list) else [value]:
            if argument.name == "command":  # supervised, and checked by itself
                continue
            if not (argument.buckets and is_address(str(text))):
                local(text, f"heirloom {verb.name} {argument.options.get('metavar') or argument.names[0]}")
    flag = ""
    for text in rest:
        if text.startswith("--"):
            flag, _, text = text.partition("=")
        field = flag.lstrip("-").replace("-", "_").rpartition(".")[2]
        if not (field in FIELDS and is_address(text)):
            local(text, f"heirloom {verb.name} {flag}".rstrip())


def _help_of_recipe(argv: Sequence[str]) -> None:
    """Lists a recipe's fields for `heirloom train RECIPE --help` and exits; without a recipe, argparse lists the verb's
    options.
    """
    if len(argv) > 2 and argv[-1] in ("--help", "-h") and any(verb.name == argv[0] and verb.flags for verb in VERBS):
        from heirloom.common import config

        names = [argv[1]] if config.is_recipe(argv[1]) else [word for word in argv[2:-1] if word in config.recipes()]
        if names:
            config.load(names[0], ["--help"], argv[0])


def _help_of_settings(argv: Sequence[str]) -> None:
    """Lists the settings of a verb's methods, which are flags as well."""
    for path in next((verb.settings for verb in VERBS if verb.name == argv[0]), ()):
        from heirloom.common import config

        with contextlib.redirect_stdout(io.StringIO()) as listed, contextlib.suppress(SystemExit):
            config.parse(pkgutil.resolve_name(path)(), ["--help"], "")
        _, _, options = listed.getvalue().partition("\n\n")  # after its usage
        print(f"\n{options.rstrip()}")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line; argparse prints two paragraphs."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    usage = "heirloom [-h] [--version] VERB ..."
    parser = _Parser(prog="heirloom", usage=usage, description="Small models inherit from big ones, in JAX.")
    parser.add_argument("--version", action="version", version=f"heirloom {version('heirloom-jax')}")
    # argparse puts a verb that is longer than this metavar and its indentation on a line of its own.
    table: dict[str, Any] = {"metavar": "VERB (below)", "prog": "heirloom", "parser_class": _Parser}
    subparsers = parser.add_subparsers(dest="verb", required=True, **table)
    for verb in VERBS:
        # Flags of recipes are passed through, so an abbreviation here could swallow one.
        about = f"{verb.help[0].upper()}{verb.help[1:]}."
        how: dict[str, Any] = {"description": about, "epilog": verb.more, "allow_abbrev": False}
        sub = subparsers.add_parser(verb.name, help=verb.help, **how)
        for one in verb.arguments:
            sub.add_argument(*one.names, **one.options)
        if verb.json:
            sub.add_argument("--json", type=destination, metavar="FILE", help="write the result as data, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())

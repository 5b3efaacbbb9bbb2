"""What count_open_clips.py and count_timm_vits.py share: how many of a library's models are read, and right.

Each model is built by its own library with random weights, saved as the library saves it, opened by heirloom, and
compared: *right* where the outputs agree to 1e-4, *wrong* where they do not, *refused* with the reason.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.errors import InputError

TOLERANCE = 1e-4
Save = Callable[[str, Path], Any]
Difference = Callable[[Any, Donor, Mapping[str, np.ndarray]], float]


def perturb(model: torch.nn.Module) -> None:
    """Add noise to all parameters except scalars, so that norms, biases and with them wrong settings show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.05 * torch.randn_like(parameter))


def outcome(name: str, family: Family, save: Save, difference: Difference) -> str:
    """`right`, `wrong: ` with the error, or `refused: ` with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = save(name, Path(folder))
            donor = open_donor(Path(folder), [family])
        except InputError as error:
            return f"refused: {str(error).replace(f'{folder}/', '').replace(folder, '').lstrip(': ')}"
        params = {path: np.asarray(view, np.float32) for path, view in donor.source.values.items()}
        with jax.default_matmul_precision("highest"), torch.no_grad():
            error = difference(model, donor, params)
    return "right" if error <= TOLERANCE else f"wrong: outputs differ by {error:.1e}"


def count(
    about: str | None,
    library: Any,
    names: Iterable[str],
    family: Family,
    save: Save,
    difference: Difference,
    reason: Callable[[str], str] = str,
) -> None:
    """Run a script: print the wrong models, the reasons of refusals and the counts; exit with 1 when a model is wrong.

    about: the script's docstring. library: the module, for its name and version. save: builds the model of a name,
    writes it to a folder and returns it; raises InputError where the name alone is refused. difference: the error
    between the outputs of the saved model and ours. reason: shortens a refusal, to count it by kind.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", type=Path, help="write the outcome of every name; names in it are not built again")
    parser.add_argument("--page", type=Path, help="write the counts into this page, such as docs/coverage.md")
    args = parser.parse_args()
    version, names = f"{library.__name__} {library.__version__}", list(names)
    known = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    found: dict[str, str] = known.get(version, {})
    for name in names:
        if args.only in name and name not in found:
            found[name] = outcome(name, family, save, difference)
            print(f"{name}: {found[name]}", flush=True)
            if args.json:
                args.json.write_text(json.dumps({version: found}, indent=2) + "\n")
    counts = kinds(found, reason)
    for text, number in counts.items():
        print(f"{number:4} {text[:150]}")
    print(f"{version}: {len(found)} of {len(names)} models")
    if args.page and (missing := [name for name in names if name not in found]):
        sys.exit(f"{missing[0]} is not measured, so that {args.page} is left as it is: run without --only")
    if args.page:
        rows = "\n".join(f"| {text} | {number} |" for text, number in counts.items())
        insert(args.page, library.__name__, f"{version}, all {len(names)} models:\n\n| | models |\n|---|---|\n{rows}")
    sys.exit(bool(counts["wrong"]))


def kinds(found: Mapping[str, str], reason: Callable[[str], str] = str) -> dict[str, int]:
    """Number of models that are right, wrong, and refused for each reason, most frequent first."""
    said = Counter(text.partition(":")[0] for text in found.values())
    refusals = (text.removeprefix("refused: ") for text in found.values() if text.startswith("refused"))
    refused = {f"refused: {text}": number for text, number in Counter(map(reason, refusals)).most_common()}
    return {"right": said["right"], "wrong": said["wrong"]} | refused


def insert(page: Path, name: str, text: str) -> None:
    """Replace what a page has between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    begin, end = (f"<!-- {name}: {edge} -->\n" for edge in ("begin", "end"))
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        sys.exit(f"{page} has no lines {begin.strip()} and {end.strip()}: add them where the text belongs")
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")

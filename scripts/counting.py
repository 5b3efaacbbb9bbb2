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
        model = save(name, Path(folder))
        try:
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
    writes it to a folder and returns it. difference: the error between the outputs of the saved model and ours. reason:
    shortens a refusal, to count it by kind.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", type=Path, help="write the outcome of every name")
    args = parser.parse_args()
    found: dict[str, str] = {}
    for name in names:
        if args.only in name:
            found[name] = outcome(name, family, save, difference)
            if found[name].startswith("wrong"):
                print(f"{name}: {found[name]}")
    kinds = Counter(said.partition(":")[0] for said in found.values())
    refusals = [said.removeprefix("refused: ") for said in found.values() if said.startswith("refused")]
    for text, number in Counter(map(reason, refusals)).most_common():
        print(f"{number:4} refused: {text[:150]}")
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("right", "refused", "wrong"))
    print(f"{library.__name__} {library.__version__}: {counts} of {len(found)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(kinds["wrong"]))

"""The model card (README.md) of a weights folder, from what lies in the folder and in the run that trained it."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.verify import Check
from heirloom.common.checkpoint.weights import ORBAX
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json
from heirloom.common.paths import METRICS
from heirloom.common.train.metrics import MetricsFile, last_scores

SCORES = "scores.json"  # what `heirloom eval FOLDER --json FOLDER/scores.json` writes
_LIBRARIES = {"hf": "transformers", "diffusers": "diffusers", "open_clip": "open_clip", "timm": "timm"}
_HUB = re.compile(r"hf:([^/@\s]+/[^/@\s]+)")
_MISSING = "it is not a file of heirloom; remove it or write it again"


@dataclass(frozen=True)
class Facts:
    """What is known of a model.

    sources: SOURCE of the weights it has or began with, by role ("donor", "teacher"). inherited: share of the
    parameters that came from the donor; None where that is not recorded. check: content of verify.json. scores: rows of
    `heirloom eval`. steps: of the training; 0 for a model that was not trained here.
    """

    donor: Donor
    sources: Mapping[str, str] = field(default_factory=dict)
    inherited: float | None = None
    check: Check | None = None
    scores: tuple[Mapping[str, Any], ...] = ()
    steps: int = 0

    @property
    def library(self) -> str:
        """The name by which the hub knows the library that reads the folder."""
        if self.donor.format == "flax":
            return "diffusers" if "_class_name" in read_json(self.donor.folder / "config.json") else "transformers"
        return _LIBRARIES.get(self.donor.format, "heirloom")

    @property
    def bases(self) -> list[str]:
        """The models on the hub that the weights come from; teachers only where there is no donor."""
        chosen = [self.sources["donor"]] if "donor" in self.sources else list(self.sources.values())
        return list(dict.fromkeys(found[1] for source in chosen if (found := _HUB.match(source))))


def facts(donor: Donor) -> Facts:
    """Collects what the folder of a model and its run (`RUN/model`) say.

    Raises InputError for a damaged file, and KeyError, TypeError and the like for JSON of another form.
    """
    folder, run = donor.folder, donor.folder.parent
    sources: dict[str, str] = {}
    known: dict[str, Any] = {}
    if (file := folder / "provenance.json").is_file():
        record = _object(file, "source", "fraction")
        sources["donor"], known["inherited"] = str(record["source"]), float(record["fraction"])
    if (file := folder / "verify.json").is_file():
        record = _object(file, "passed", "reference")
        given = {f.name: record[f.name] for f in fields(Check) if f.name in record}
        known["check"] = Check(**given | {"guessed": tuple(given.get("guessed", ()))})
    rows: list[Mapping[str, Any]] = []
    if (file := folder / SCORES).is_file():
        rows += _object(file, "rows")["rows"]
    if folder.name == "model" and (run / METRICS).is_file():
        lines = MetricsFile(run / METRICS).lines()
        known["steps"] = lines[-1]["step"] if lines else 0
        held_out = {"dataset": "held out, in training", "n": None}
        rows += [held_out | {"metric": name, "value": value} for name, value in last_scores(lines)[1].items()]
        if (run / "sources.json").is_file():
            sources |= {role: str(about["path"]) for role, about in read_json(run / "sources.json").items()}
    return Facts(donor, sources=sources, scores=tuple(rows), **known)


def _object(file: Path, *names: str) -> dict[str, Any]:
    value = read_json(file)
    if missing := [name for name in names if name not in value]:
        raise InputError(f"{file}: {missing[0]!r} is missing: {_MISSING}")
    return value


def card(about: Facts, name: str, license: str = "") -> str:
    """Returns the card: a YAML header that the hub reads, then a page. name: "org/name". license: of the hub's ids."""
    from huggingface_hub import ModelCardData

    donor = about.donor
    tags = list(dict.fromkeys(["heirloom", "jax", donor.family.name, *(["flax"] if donor.format in ORBAX else [])]))
    base: Any = about.bases[0] if len(about.bases) == 1 else about.bases or None
    header = ModelCardData(library_name=about.library, license=license or None, base_model=base, tags=tags)
    counts = donor.family.parameters(donor.source.spec)
    sections = {
        "Origin": _origin(about),
        "Verification": _verification(about),
        "Scores": _scores(about),
        "Config": f"```json\n{json.dumps(asdict(donor.cfg), indent=2)}\n```",
    }
    lines = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {name.rpartition('/')[2]}\n",
        f"{_article(donor)} with {counts['total']:,} parameters. "
        f"heirloom {version('heirloom-jax')} wrote this page.\n",
        f"```\nheirloom inspect hf:{name}\n```\n",
        *(f"## {title}\n\n{text}\n" for title, text in sections.items() if text),
    ]
    return "\n".join(lines)


def _article(donor: Donor) -> str:
    kind = f"{donor.family.name} model in the {donor.format} format"
    return f"{'An' if kind[0] in 'aeio' else 'A'} {kind}"


def _origin(about: Facts) -> str:
    lines = []
    if about.steps:
        lines.append(f"Trained for {about.steps:,} steps.")
    if about.inherited is not None:
        lines.append(f"{about.inherited:.1%} of the parameters come from the donor.")
    for role, source in about.sources.items():
        lines.append(f"{role.capitalize()}: {_public(source)}")
    return "\n\n".join(lines)


def _public(source: str) -> str:
    """Returns a SOURCE as a link, or the last name of a local path: the rest of it is nobody else's concern."""
    from huggingface_hub import constants

    if found := _HUB.match(source):
        return f"[{found[1]}]({constants.ENDPOINT}/{found[1]})"
    return f"`{Path(source).name}`" if "/" in source and "://" not in source else f"`{source}`"


def _verification(about: Facts) -> str:
    if about.check is None:
        return ""
    text = f"The conversion was {about.check.sentence()}."
    if versions := ", ".join(f"{name} {number}" for name, number in about.check.versions.items()):
        text += f" Versions: {versions}."
    guesses = "".join(f"\n- {guess}" for guess in about.check.guessed)
    return text + (f"\n\nSettings that the source did not contain:\n{guesses}" if guesses else "")


def _scores(about: Facts) -> str:
    if not about.scores:
        return ""
    lines = ["| data set | metric | value | examples |", "|---|---|---|---|"]
    for row in about.scores:
        lines.append(f"| {row['dataset']} | {row['metric']} | {row['value']:.4g} | {row.get('n') or ''} |")
    return "\n".join(lines)


def warn_of_paths(folder: Path) -> None:
    """Remarks that a file of the folder names a path of this machine, which others will see."""
    files = {"provenance.json": ("source",), "pipeline.json": ("pipeline", "text_encoder", "autoencoder")}
    for file, names in ((folder / name, names) for name, names in files.items()):
        said = read_json(file) if file.is_file() else {}
        for name in names:
            if (path := str(said.get(name))).startswith("/"):
                remark(f"{file} names {path}, which others will see; edit its {name!r} if they should not")

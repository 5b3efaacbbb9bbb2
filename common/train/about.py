"""`RUN/about.json`: the size of a run's student, its id, and every start of the run. `heirloom report` shows it."""

import platform
import secrets
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from heirloom.common.files import read_json, staged, write_json
from heirloom.common.train.agreement import versions

FILE = "about.json"


def note_start(run: Path, step: int) -> None:
    """Adds this start to RUN/about.json: time, command, last step on disk, versions, devices of all processes.

    Call it in the first process, after the run is known not to be finished.
    """
    about = _read(run)
    kinds = Counter(device.device_kind for device in jax.devices())
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": command(sys.argv), "step": step}
    start |= {"python": platform.python_version(), "versions": versions(), "backend": jax.default_backend()}
    start |= {"devices": dict(kinds), "processes": jax.process_count()}
    _write(run, about | {"starts": [*about.get("starts", []), start]})


def note_student(run: Path, family: str, parameters: Mapping[str, int], macs: int) -> None:
    """Sets the student in RUN/about.json. parameters: by part and in total. macs: of one example."""
    _write(run, _read(run) | {"student": {"family": family, "parameters": dict(parameters), "macs": macs}})


def identity(run: Path) -> str:
    """Returns the run's random id, from RUN/about.json; drawn and noted there at the first call."""
    if "id" not in (about := _read(run)):
        about["id"] = secrets.token_hex(4)
        _write(run, about)
    return str(about["id"])


def command(argv: list[str]) -> str:
    """Returns a process's command as one would type it; empty where no script was started, as in a notebook."""
    program = Path(argv[0])
    if program.name == "heirloom" or program.parts[-2:] == ("common", "cli.py"):
        return shlex.join(["heirloom", *argv[1:]])
    return shlex.join(["python", *argv]) if program.suffix == ".py" and "ipykernel" not in program.name else ""


def _read(run: Path) -> dict[str, Any]:
    return read_json(run / FILE) if (run / FILE).is_file() else {}


def _write(run: Path, about: Mapping[str, Any]) -> None:
    with staged(run / FILE, force=True) as part:
        write_json(part, about)

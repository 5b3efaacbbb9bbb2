"""SHA-256 of every file of a saved training state: written before the state gets its final name, checked before it is
restored.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heirloom.common.errors import InputError
from heirloom.common.files import read_json, replacing, sha256

MANIFEST = "sha256.json"
MARK = {"sha256": MANIFEST}  # is part of a state's metadata, so that a lost manifest is noticed
METADATA = "_CHECKPOINT_METADATA"
LATE = (METADATA, "commit_success.txt")  # orbax writes these last, after `seal`


def seal(folder: Path) -> None:
    """Writes the manifest of a state whose arrays are complete. Raises OSError when the disk fails."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    _write(folder, _digests(folder, sorted(set(names) - set(LATE))))


def complete(folder: Path) -> None:
    """Adds the files that are written last to the manifest of a state that has its final name.

    If a job is killed before this, these two are not checked; they do not change what is restored.
    """
    late = [name for name in LATE if (folder / name).is_file()]
    _write(folder, read_json(folder / MANIFEST) | _digests(folder, late))


def sealed(folder: Path) -> bool:
    """Returns whether a state has a manifest, or had one; earlier versions wrote none."""
    return (folder / MANIFEST).exists() or _metadata(folder).get("custom_metadata") == MARK


def damage(folder: Path) -> str:
    """Returns what is wrong with a state, such as `state/d/0a is missing`; an empty string when it is whole.

    Of a state that is not `sealed`, only the metadata can be checked.
    """
    try:
        if problem := unreadable(folder):
            return problem
        if not sealed(folder):
            return ""
        if not (folder / MANIFEST).exists():
            return f"{MANIFEST} is missing"
        written = read_json(folder / MANIFEST)
        if missing := [name for name in written if not (folder / name).is_file()]:
            return f"{missing[0]} is missing"
        found = _digests(folder, list(written))
        changed = [name for name in written if found[name] != written[name]]
        return f"{changed[0]} differs from its SHA-256" if changed else ""
    except InputError:
        return f"{MANIFEST} is damaged"
    except (OSError, ValueError) as error:  # ValueError: a damaged manifest names a file with a NUL
        return f"it cannot be read ({getattr(error, 'strerror', None) or error})"


def unreadable(folder: Path) -> str:
    """Returns what is wrong with the metadata of a state, which orbax reads of all states; reads no other file."""
    if not (folder / METADATA).is_file():
        return f"{METADATA} is missing"
    try:
        datetime.fromtimestamp((_metadata(folder).get("commit_timestamp_nsecs") or 0) / 1e9, UTC)
    except (InputError, TypeError, ValueError, OverflowError, OSError):
        return f"{METADATA} is damaged"
    return ""


def _metadata(folder: Path) -> dict[str, Any]:
    return read_json(folder / METADATA)


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def _write(folder: Path, digests: dict[str, str]) -> None:
    with replacing(folder / MANIFEST) as part, part.open("w") as file:
        json.dump(digests, file, indent=1)
        file.flush()
        os.fsync(file.fileno())

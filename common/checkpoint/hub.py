"""Finds a SOURCE: a local path, a model that comes with a package, or `hf:org/name[/folder or file][@revision]` and
addresses in buckets, downloaded once.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from heirloom.common.checkpoint.unwrap import KINDS, NO_WEIGHTS, NOTHING
from heirloom.common.errors import InputError, nearest
from heirloom.common.fetch import fetch, fetch_folder
from heirloom.common.paths import Address, place

_OTHER = ("*.json", "*.txt", "*.model")
_SIDECARS = (".json", ".txt", ".model")


def locate(source: str, embedded: Mapping[str, Path] | None = None) -> Path:
    """Returns the local file or folder of a SOURCE, downloaded if needed; `embedded:NAME` is one of `embedded`.

    Raises InputError when it does not exist or cannot be downloaded.
    """
    source = str(source)  # from Python, a Path too
    if source.startswith("embedded:"):
        name, known = source.removeprefix("embedded:"), embedded or {}
        if name not in known:
            raise InputError(
                f"no embedded model {name!r}{nearest(name, known)} (there are: {', '.join(known) or 'none'})"
            )
        return known[name]
    if not source.startswith("hf:"):
        path = place(source)
        if isinstance(path, Address):
            return _from_bucket(path)
        if not path.exists():
            raise InputError(f"{source}: no such file or folder (a Hugging Face model is written hf:org/name)")
        return path
    from huggingface_hub import HfApi, snapshot_download

    where, _, revision = source.removeprefix("hf:").partition("@")
    name, folder = "/".join(where.split("/")[:2]), "/".join(where.split("/")[2:])
    try:
        with _without_warnings():
            wanted = _wanted(HfApi().list_repo_files(name, revision=revision or None), folder)
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted)) / folder
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    # The hub's client raises its own errors, httpx's and OSError: all mean that the download failed.
    except Exception as error:
        cached = _cached(name, revision)
        if cached is not None and (not folder or (cached / folder).exists()):
            return cached / folder
        raise InputError(
            f"{source}: could not be fetched ({str(error).splitlines()[0][:200]}); check name and network"
        ) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps the hub's client from printing every attempt of a request that fails in the end, twice."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def local_path(source: str) -> Path | None:
    """Returns the absolute path of a SOURCE that is a local file or folder; None for others."""
    if not source or source.startswith(("embedded:", "hf:")) or isinstance(path := place(source), Address):
        return None
    return Path(os.path.abspath(path))


def absolute(source: str) -> str:
    """Returns a SOURCE that means the same from any working folder."""
    return str(local_path(source) or source)


def _wanted(files: list[str], place: str) -> list[str]:
    """Returns patterns of the files to fetch. place: a folder of the repository, empty for all, or a file, with which
    the sidecar files next to it are fetched.

    Of each folder the first of `KINDS`. Numpy's archives, which may hold anything, only where no folder has another
    kind. Raises InputError for a repository without weights.
    """
    if place in files:
        folder = place.rpartition("/")[0]
        shards = (place.removesuffix(".index.json").rpartition(".")[2],) if place.endswith(".index.json") else ()
        near = [f for f in files if f.rpartition("/")[0] == folder]
        endings = (*_SIDECARS, *(f".{ending}" for ending in shards))
        return [escape(f) for f in near if f == place or f.endswith(endings)]
    inside: dict[str, list[str]] = {}
    for file in files:
        if not place or file.startswith(f"{place}/"):
            inside.setdefault(file.rpartition("/")[0], []).append(file)
    if place and not inside:
        raise InputError(f"the repository has no file or folder {place!r}")
    found = {folder: kind for folder, names in inside.items() if (kind := _kind(names))}
    kinds = {folder: kind for folder, kind in found.items() if kind != KINDS[-1]} or found
    names = [name for names in inside.values() for name in names]
    if not kinds and not any(name.endswith("adapter_config.json") for name in names):  # which is refused when opened
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise InputError(f"the repository has {NOTHING}; it has {', '.join(names[:8]) or 'no files'}{more}")
    if len(set(kinds.values())) <= 1:
        patterns = (*next(iter(kinds.values()), ()), *_OTHER)
        return [f"{place}/{pattern}" if place else pattern for pattern in patterns]
    wanted = ((f, (*kinds.get(folder, ()), *_OTHER)) for folder, names in inside.items() for f in names)
    return [escape(f) for f, patterns in wanted if any(fnmatchcase(f, pattern) for pattern in patterns)]


def _kind(files: Sequence[str]) -> tuple[str, ...]:
    """Returns the patterns of the kind of weights to take from a folder with these files; none without weights."""
    models = [f for f in files if not NO_WEIGHTS.match(f.rpartition("/")[2])]
    return next((kind for kind in KINDS if any(fnmatchcase(f, one) for f in models for one in kind)), ())


def _from_bucket(address: Address) -> Path:
    """Downloads a folder (of a run, all but its training states), or a file with the sidecar files next to it."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        offline = "leave out --offline (or HF_HUB_OFFLINE)"
        raise InputError(f"{address}: would be downloaded; {offline}, or give a local path")
    try:
        if address.is_dir():
            found = address.files()
            run = "metrics.jsonl" in found
            return fetch_folder(address, found, lambda name: not (run and name.startswith("checkpoints/")))
        if not address.is_file():
            raise InputError(f"{address}: no such file or folder")
        found = address.parent.files(deep=False)
    except OSError as error:
        raise InputError(f"{address}: cannot be read ({error.strerror or error})") from error
    names = {address.name}
    if address.name.endswith(".index.json"):
        try:
            names |= set(json.loads(fetch(address).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{address}: holds no weight_map from tensors to files; fetch it again") from error
    return fetch_folder(address.parent, found, lambda name: name in names or name.endswith(_SIDECARS)) / address.name


def _cached(name: str, revision: str) -> Path | None:
    """Returns the snapshot of an earlier download, for work without a network; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None

"""Finds a SOURCE: a local path, a model that comes with a package, or `hf:org/name[/folder][@revision]` and addresses
in buckets, downloaded once.
"""

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from heirloom.common.errors import InputError, nearest
from heirloom.common.fetch import fetch, fetch_folder
from heirloom.common.paths import Address, place

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")
_FLAX = ("*.msgpack", "*.msgpack.index.json")
_OTHER = ("*.json", "*.txt", "*.model")
_SIDECARS = (".json", ".txt", ".model")


def locate(source: str, embedded: Mapping[str, Path] | None = None) -> Path:
    """Returns the local file or folder of a SOURCE, downloaded if needed; `embedded:NAME` is one of `embedded`.

    Raises InputError when it does not exist or cannot be downloaded.
    """
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
        files = [f for f in HfApi().list_repo_files(name, revision=revision or None) if f.startswith(folder)]
        # Pickles only where there are no safetensors, Flax's files only where there is neither.
        weights = next(
            (kinds for kinds in (_WEIGHTS, _PICKLES) if any(fnmatchcase(f, kind) for f in files for kind in kinds)),
            _FLAX,
        )
        wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in (*weights, *_OTHER)]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted)) / folder
    except (
        Exception
    ) as error:  # the hub's client raises its own errors, httpx's and OSError: all mean that the download failed
        cached = _cached(name, revision)
        if cached is not None and (not folder or (cached / folder).is_dir()):
            return cached / folder
        raise InputError(
            f"{source}: could not be fetched ({str(error).splitlines()[0][:200]}); check name and network"
        ) from error


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

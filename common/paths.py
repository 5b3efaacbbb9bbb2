"""Local paths only: an address with a scheme is refused at every door, until buckets can be read and written."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from heirloom.common.errors import InputError

_ADDRESS = re.compile(r"(?:^|[=:@,])([A-Za-z][A-Za-z0-9+.-]+)://")
_COLLAPSED = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/")  # what pathlib makes of it


def local(path: str | Path) -> None:
    """Raises InputError when `path` is an address with a scheme (gs://, s3://, https://, file://), instead of a path on this machine."""
    found = (_COLLAPSED if isinstance(path, Path) else _ADDRESS).search(str(path))
    if not found:
        return
    text = str(path)
    if found[1] in ("http", "https"):
        raise InputError(f"{text}: web addresses are not read; a Hugging Face model is written hf:org/name, other files are fetched before")
    if found[1] == "file":
        raise InputError(f"{text}: write the path alone, without file:")
    raise InputError(f"{text}: buckets ({found[1]}:) are neither read nor written; give a path on this machine, and copy to or from it")


def all_local(cfg: Any) -> None:
    """Raises InputError for the first text in a config, at any depth, that is such an address."""
    if isinstance(cfg, str | Path):
        local(cfg)
    elif is_dataclass(cfg):
        for field in fields(cfg):
            all_local(getattr(cfg, field.name))
    elif isinstance(cfg, tuple | list):
        for value in cfg:
            all_local(value)

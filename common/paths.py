"""Refuses addresses with a scheme (gs://, s3://): only local paths can be read and written so far."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

from heirloom.common.errors import InputError

_ADDRESS = re.compile(r"(?:^|[=:@,])([A-Za-z][A-Za-z0-9+.-]+)://")
_COLLAPSED = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib turns :// into :/


def local(path: str | Path) -> None:
    """Raises InputError when `path` is an address (gs://, s3://, https://, file://), not a path on this machine."""
    found = (_COLLAPSED if isinstance(path, Path) else _ADDRESS).search(str(path))
    if not found:
        return
    text = str(path)
    if found[1] in ("http", "https"):
        needed = "write hf:org/name for a Hugging Face model, and download other files first"
        raise InputError(f"{text}: web addresses are not read; {needed}")
    if found[1] == "file":
        raise InputError(f"{text}: write the path alone, without file:")
    copy = "give a local path, and copy to or from it"
    raise InputError(f"{text}: buckets ({found[1]}:) are neither read nor written; {copy}")


def all_local(cfg: object) -> None:
    """Raises InputError for the first string in a config, at any depth, that is an address with a scheme."""
    if isinstance(cfg, str | Path):
        local(cfg)
    elif is_dataclass(cfg):
        for field in fields(cfg):
            all_local(getattr(cfg, field.name))
    elif isinstance(cfg, tuple | list):
        for value in cfg:
            all_local(value)

"""The members of a tar, from its headers.

Headers that almost all shards have are parsed here, ten times as fast as tarfile does: regular files and folders, and
pax headers that only refine times and owners. For any other header, and for anything that looks wrong, the whole shard
is read by tarfile.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from heirloom.common.errors import InputError
from heirloom.common.paths import AnyPath

BLOCK = 512
_FILE, _FOLDER, _PAX = b"0\0", b"5", b"x"  # type flags
_SURE = frozenset(("mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"))  # no name, no size
_MAGICS = (b"ustar\x0000", b"ustar  \x00")  # POSIX, GNU


class Member(NamedTuple):
    """A regular file of a sample. offset: of its first byte in the shard."""

    name: str
    offset: int
    size: int


def split(name: str) -> tuple[str, str] | None:
    """Returns the sample of a member and its extension; None for hidden files and those without an extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None
    return f"{folder}/{stem}" if folder else stem, extension.lower()


class _Unusual(Exception):
    """The shard has something that only tarfile is trusted with."""


def members(shard: AnyPath) -> list[Member]:
    """Reads all headers; folders, hidden files and files without an extension are left out.

    Raises InputError unless the tar ends with a block of zeros (else it is cut or damaged), and for links, devices,
    pipes and sparse files. A hard link to an earlier member has the bytes of that member.
    """
    try:
        with shard.open("rb") as data:
            return [member for member in _plain(data) if split(member.name)]
    except (_Unusual, OSError):  # tarfile says what is wrong
        return _by_tarfile(shard)


def _plain(data: BinaryIO) -> Iterator[Member]:
    """Yields the members of a tar. Raises _Unusual."""
    at = 0
    while True:
        header = data.read(BLOCK)
        at += BLOCK
        if header == bytes(BLOCK):
            return
        kind, size = header[156:157], _size(header)
        skipped = -(-size // BLOCK) * BLOCK
        if kind == _PAX:
            _sure(data.read(skipped)[:size])
        else:
            if kind not in _FILE and kind != _FOLDER:
                raise _Unusual
            if kind != _FOLDER:
                yield Member(_name(header), at, size)
            data.seek(at + skipped)
        at += skipped


def _size(header: bytes) -> int:
    """Returns the size in a header whose checksum is right."""
    if len(header) < BLOCK or header[257:265] not in _MAGICS:
        raise _Unusual
    try:
        size, given = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError as error:  # a size in base 256, or a damaged header
        raise _Unusual from error
    if size < 0 or given != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _Unusual
    return size


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    old = name.endswith(b"/") or (prefix and header[257:265] != _MAGICS[0])  # marks folders so, has times there
    if not name or old:
        raise _Unusual
    return (prefix + b"/" + name if prefix else name).decode(tarfile.ENCODING, "surrogateescape")


def _sure(records: bytes) -> None:
    """Raises _Unusual unless a pax header, of lines `LENGTH KEY=VALUE`, has only keys that change nothing here."""
    while records:
        length, _, rest = records.partition(b" ")
        key, equals, _ = rest.partition(b"=")
        if not length.isdigit() or int(length) <= len(length) or not equals or key.decode("latin-1") not in _SURE:
            raise _Unusual
        records = records[int(length) :]


def _by_tarfile(shard: AnyPath) -> list[Member]:
    try:
        with shard.open("rb") as data, tarfile.open(fileobj=data, mode="r:") as tar:
            found = tar.getmembers()
            data.seek(tar.offset)
            end = data.read(BLOCK)
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # the last two: a header with impossible numbers
        needed = "it is compressed: unpack it with gunzip, unxz or unzstd" if _compressed(shard) else "fetch it again"
        raise InputError(f"{shard} is not readable as an uncompressed tar: {error}; {needed}") from error
    if end != bytes(BLOCK):
        raise InputError(f"{shard} is truncated or damaged at byte {tar.offset}; fetch it again")
    files: dict[str, Member] = {}
    out = []
    for member in found:
        if not member.isdir() and split(member.name):
            files[member.name] = one = _file(shard, member, files)
            out.append(one)
    return out


def _compressed(shard: AnyPath) -> bool:
    """Returns whether a file begins as gzip, xz, zstd or bzip2 write it."""
    try:
        with shard.open("rb") as data:
            return data.read(6).startswith((b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh"))
    except OSError:
        return False


def _file(shard: AnyPath, member: tarfile.TarInfo, files: dict[str, Member]) -> Member:
    """Returns where the bytes of a member are; of a hard link, those of its target."""
    if member.islnk() and member.linkname in files:
        return files[member.linkname]._replace(name=member.name)
    if not member.isreg() or member.issparse():
        kind = "a link, a device, a pipe or a sparse file"
        if member.islnk():
            kind = "a hard link to a file that is not in the shard"
        raise InputError(f"{shard}: its member {member.name!r} is {kind}; pack files themselves (tar --dereference)")
    return Member(member.name, member.offset_data, member.size)

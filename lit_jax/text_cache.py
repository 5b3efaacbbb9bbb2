"""What a text-to-image model is trained on, stored once: latents of pictures, by size, and features of captions.

    CACHE/cache.json                 what it was made from; the sizes; the widths
    CACHE/autoencoder.json           whose latents they are
    CACHE/512x512/moments.npy        [n, row, col, 2 latent] f16: mean before logvar, not scaled
    CACHE/512x512/records.npy        [n] int64: numbers of the records in the data
    CACHE/features.f16               [tokens of all captions, width]: without padding
    CACHE/captions.npy               [records, columns] int64: number of the first caption of each column
    CACHE/starts.npy                 [captions + 1] int64: first token of each caption
    CACHE/null.npy, null_mask.npy    [tokens, width] f16 and [tokens] bool: the empty text, with its padding
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.hub import absolute
from heirloom.common.data.caches import new_cache, write_columns
from heirloom.common.data.content import content, samples
from heirloom.common.data.pictures import decode_record
from heirloom.common.data.sources import Record, Source, SourceConfig, captions, open_source
from heirloom.common.errors import InputError
from heirloom.common.evaluate.features import embedder
from heirloom.common.files import read_json, write_json
from heirloom.common.reading import mapped
from heirloom.common.train.parameters import load_params
from lit_jax.aspect import nearest_ratio
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.data import cover_crop
from lit_jax.latents import cache_origin, held
from lit_jax.origin import autoencoder_origin, write_origin
from lit_jax.pixart import PixArtConfig
from lit_jax.text.encoder import TextEncoder, TowerEncoder

ABOUT, VERSION = "cache.json", 1
BATCH, TEXTS = 16, 64  # pictures and captions that are encoded at a time
Columns = list[list[str]]


def is_text_cache(path: str | Path) -> bool:
    """Tell whether a folder is a cache of latents and captions."""
    return (Path(path) / ABOUT).is_file() and (Path(path) / "features.f16").is_file()


def write_text_cache(
    folder: Path,
    data: SourceConfig,
    sizes: Sequence[tuple[int, int]],
    autoencoder: Donor,
    autoencoder_source: str,
    text: TextEncoder | TowerEncoder,
    text_source: str,
    mesh: Mesh,
    *,
    ratios: str = "",
) -> dict[str, Any]:
    """Encode all pictures and captions of `data`; returns the content of `cache.json`.

    Captions are the column `data.text` and the `data.columns`. sizes: (height, width) in pixels; a picture goes to the
    one whose ratio is nearest. ratios: their name in the recipe. The folder gets its name when it is complete. Raises
    InputError for a record without picture or caption, for a value that float16 cannot hold, in a job of several
    processes, and if `folder` exists.
    """
    source, names = open_source(data), [name for name in (data.text, *data.columns) if name]
    if "image" not in source[0] or not data.text:
        raise InputError(f"{data.path}: pictures and captions are needed: set data.image and data.text")
    if "text" not in source[0]:
        raise InputError(f"{data.path} has pictures without captions: {_table_advice(source, data)}")
    with new_cache(folder) as staging:
        captions: list[Columns] = []
        members: list[list[int]] = [[] for _ in sizes]
        for i in track(range(len(source)), description="reading"):
            record = source[i]
            captions.append(_columns(record, data))
            width, height = decode_record(record).size
            members[nearest_ratio(sizes, height, width)].append(i)
        _write_latents(staging, source, sizes, members, autoencoder, mesh)
        origin = autoencoder_origin(autoencoder, autoencoder_source)
        write_origin(staging, origin)
        _write_captions(staging, captions, text)
        used = [[*size, len(rows)] for size, rows in zip(sizes, members, strict=True) if rows]
        about = {"version": VERSION, "data": asdict(data), "records": len(source), "columns": names, "sizes": used}
        about |= {"text_encoder": absolute(text_source), "tokens": text.tokens, "width": text.width}
        about |= {"autoencoder": absolute(autoencoder_source), "ratios": ratios} | content_of(source, data)
        write_json(staging / ABOUT, about)
    return about


def content_of(source: Source, data: SourceConfig) -> dict[str, Any]:
    """The number of records, and hashes of some: by these a cache in a run folder is matched to the recipe's data."""
    records = samples(source)
    return content(source, records, [json.dumps(_columns(record, data)) for record in records])


def _table_advice(source: Source, data: SourceConfig) -> str:
    """Returns what to type for captions next to a folder of pictures, in a table such as imagefolder's metadata.csv."""
    tables = getattr(source, "tables", ())
    table = next((name for name in tables if name.endswith((".csv", ".tsv"))), "")
    if table:
        file = "/".join(part.rstrip("/") for part in (data.path, data.split, table) if part)
        return f"--data.path {file} --data.image file_name --data.text text takes those of the table, by its columns"
    beside = f" ({tables[0]} is not read)" if tables else ""
    return f"put a .txt next to each picture, or give a .csv or .tsv with a header that has their captions{beside}"


def _columns(record: Record, data: SourceConfig) -> Columns:
    """Returns the captions of each column; an empty one counts only where the record has no other.

    Raises InputError for a record without any.
    """
    found = [record.get("text") if name == data.text else record.get(name) for name in (data.text, *data.columns)]
    columns: list[list[Any]] = []
    for cell in found:
        if isinstance(cell, str):
            cell = captions(cell, record["key"])
        columns.append(cell if isinstance(cell, list) else [] if cell is None else [cell])
    if not any(columns) or not all(isinstance(text, str) for column in columns for text in column):
        raise InputError(f"{record['key']}: its captions must be texts, at least one")
    filled = [[text for text in column if text] for column in columns]
    return filled if any(filled) else [[""], *columns[1:]]


def _write_latents(
    folder: Path, source: Source, sizes: Sequence[tuple[int, int]], members: list[list[int]], donor: Donor, mesh: Mesh
) -> None:
    def encode(params: Any, images: jax.Array) -> jax.Array:
        moments = donor.model.apply(params, images.astype(jnp.float32) / 127.5 - 1, method="encode")
        return jnp.concatenate(moments, -1).astype(jnp.float16)

    params, embed = load_params(donor, mesh), embedder(encode, mesh, BATCH)

    def parts(rows: list[int], height: int, width: int) -> Iterator[dict[str, np.ndarray]]:
        for first in track(range(0, len(rows), BATCH), description=f"encoding {height} x {width}"):
            records = [source[i] for i in rows[first : first + BATCH]]
            found = embed(params, np.stack([cover_crop(decode_record(r), height, width) for r in records]))
            yield {"moments": held(found, records)}

    for (height, width), rows in zip(sizes, members, strict=True):
        if rows:
            part = folder / f"{height}x{width}"
            part.mkdir()
            np.save(part / "records.npy", np.array(rows, np.int64))
            write_columns(part, len(rows), parts(rows, height, width))


def _write_captions(folder: Path, captions: list[Columns], text: TextEncoder | TowerEncoder) -> None:
    """Write the features of all captions and of the empty text."""
    texts = [caption for columns in captions for column in columns for caption in column]
    counts = np.array([[len(column) for column in columns] for columns in captions], np.int64)
    np.save(folder / "captions.npy", np.cumsum(counts.ravel()).reshape(counts.shape) - counts)
    lengths: list[int] = []
    with (folder / "features.f16").open("wb") as out:
        for first in track(range(0, len(texts), TEXTS), description="encoding captions"):
            features, mask = text.encode(texts[first : first + TEXTS])
            for row, real in zip(_half(features), mask, strict=True):
                lengths.append(int(real.sum()))
                out.write(row[real].tobytes())
    np.save(folder / "starts.npy", np.cumsum([0, *lengths]))
    null = text.encode([""], padding=[""])
    np.save(folder / "null.npy", _half(null.features[0]))
    np.save(folder / "null_mask.npy", null.mask[0])


def _half(features: np.ndarray) -> np.ndarray:
    half = features.astype(np.float16)
    if not np.isfinite(half).all():
        raise InputError("the features of a caption exceed float16: take a text encoder in bfloat16 or float32")
    return half


class EmptyText(NamedTuple):
    """Features [token, width] f32 of the empty text with padding, and its mask [token]."""

    features: np.ndarray
    mask: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """The features of the tokens that count, [token, width]."""
        return self.features[self.mask]


class Encoding(NamedTuple):
    """What the loss needs to know of how a cache was made."""

    autoencoder: AutoencoderConfig
    null: EmptyText


def unknown_encoding(student: PixArtConfig) -> Encoding:
    """Returns an encoding of the right shapes, to compile with before a cache exists."""
    shape = (student.text_tokens, student.text_width)
    return Encoding(AutoencoderConfig(), EmptyText(np.zeros(shape, np.float32), np.ones(shape[:1], bool)))


class TextCache:
    """An opened cache, a source of records `moments` [row, col, 2 latent] f16 and `text`: for each column of captions
    the features [token, width] f16 of each caption, read when they are used.

    groups: int [records], the number of the size of each. Raises InputError for another version, and for files that are
    missing, damaged or do not belong together.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        about = read_json(self.folder / ABOUT)
        if about.get("version") != VERSION:
            raise InputError(f"{folder}: cache version {about.get('version')}, this reads {VERSION}: make it again")
        self.about = about
        try:
            self._open(about)
        except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{folder} is damaged ({' '.join(str(error).split())}): make the cache again") from error

    def _open(self, about: dict[str, Any]) -> None:
        """Reads the tables and checks that the large files have the sizes that these tell."""
        self.sizes = [(int(height), int(width)) for height, width, _ in about["sizes"]]
        self.columns: list[str] = about["columns"]
        files = (self.folder / f"{name}.npy" for name in ("captions", "starts"))
        self._captions, self._starts = (np.array(mapped(file)) for file in files)
        self.groups = np.zeros(len(self._captions), np.int64)
        self._rows, seen = np.zeros(len(self._captions), np.int64), np.zeros(len(self._captions), np.int64)
        for group, (height, width) in enumerate(self.sizes):
            part = self.folder / f"{height}x{width}"
            rows, stored = np.array(mapped(part / "records.npy")), len(mapped(part / "moments.npy"))
            if len(rows) != stored:
                raise ValueError(f"{part.name} has {stored} latents for {len(rows)} records")
            self.groups[rows], self._rows[rows] = group, np.arange(len(rows))
            seen[rows] += 1
        if not (seen == 1).all() or len(seen) != about["records"]:
            raise ValueError(f"latents of {int((seen == 1).sum())} of {about['records']} records")
        size, wanted = (self.folder / "features.f16").stat().st_size, 2 * int(self._starts[-1]) * int(about["width"])
        if size != wanted:
            raise ValueError(f"features.f16 has {size} bytes, not {wanted}")
        features, mask = (np.array(mapped(self.folder / f"{name}.npy")) for name in ("null", "null_mask"))
        if features.shape != (about["tokens"], about["width"]) or mask.shape != features.shape[:1]:
            raise ValueError(f"null.npy is {list(features.shape)} and null_mask.npy {list(mask.shape)}")
        empty = EmptyText(features.astype(np.float32), mask)
        self.encoding = Encoding(cache_origin(self.folder).cfg, empty)
        """The autoencoder of the latents, and the empty text."""
        self._maps: tuple[list[np.ndarray], np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}  # each worker maps the files again

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Record:
        if self._maps is None:
            parts = [self.folder / f"{height}x{width}" / "moments.npy" for height, width in self.sizes]
            features = np.memmap(self.folder / "features.f16", np.float16, "r").reshape(-1, self.about["width"])
            self._maps = [mapped(part) for part in parts], features
        moments, features = self._maps
        flat, columns = self._captions.ravel(), self._captions.shape[1]
        text = []
        for place in range(index * columns, (index + 1) * columns):
            last = flat[place + 1] if place + 1 < len(flat) else len(self._starts) - 1
            rows = range(int(flat[place]), int(last))
            text.append([features[self._starts[i] : self._starts[i + 1]] for i in rows])
        key = f"{self.folder}: record {index}"
        return {"key": key, "moments": moments[self.groups[index]][self._rows[index]], "text": text}


@dataclass(frozen=True)
class TextExample:
    """Turns a record of a cache into `moments`, `text` [tokens, width] f16 of one caption, and `length` int32.

    mix: the share of each column of captions; a record that lacks a column takes one of its others.
    """

    tokens: int
    mix: tuple[float, ...]

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        shares = np.array([share if column else 0.0 for share, column in zip(self.mix, record["text"], strict=True)])
        if not shares.any():
            raise InputError(f"{record['key']} has no caption in the columns that are used: change mix")
        column = record["text"][rng.choice(len(shares), p=shares / shares.sum())]
        features = column[rng.integers(len(column))]
        text = np.zeros((self.tokens, features.shape[1]), np.float16)
        text[: len(features)] = features
        return {"moments": np.array(record["moments"]), "text": text, "length": np.int32(len(features))}

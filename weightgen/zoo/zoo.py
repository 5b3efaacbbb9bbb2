"""Zoos on disk: trained networks with what they were trained on, memory-mapped."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.files import read_json, staged, write_json
from heirloom.common.reading import mapped
from weightgen.tokens import TokenSpec, neurons, one_chunk
from weightgen.zoo.data import Bank
from weightgen.zoo.foreign import listed
from weightgen.zoo.nets import NetConfig, net

ARRAYS = ("weights", "quality", "classes")  # of a zoo, a file each


@dataclass(frozen=True)
class Zoo:
    """Trained networks on disk, memory-mapped: millions of them are read row by row.

    weights: [member, count] f32, each network's tokens without padding; quality: [member] f32, accuracy on data it was
    not trained on, or NaN; classes: [member, ways] int32, indices into the bank of pictures it was trained on, or
    empty.
    """

    weights: np.ndarray
    quality: np.ndarray
    classes: np.ndarray
    net: NetConfig | None
    spec: TokenSpec
    whole: TokenSpec | None = None
    """Where members are single chunks: the tokens of the whole checkpoint."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Of imported checkpoints: the members' names, how adapters were changed, files that were left alone."""

    def __len__(self) -> int:
        return len(self.weights)

    def tokens(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read the tokens [..., rows, length] f32 of the members at `rows` alone."""
        return self.spec.padded(np.asarray(self.weights[rows]))

    def digest(self) -> str:
        """Returns a short SHA-256 of all weights and classes, which are read block by block."""
        found, step = sha256(), max(2**24 // max(self.spec.count, 1), 1)
        for at in range(0, len(self), step):
            for array in (self.weights, self.classes):
                found.update(np.ascontiguousarray(array[at : at + step]).data)
        return found.hexdigest()[:16]

    def first(self, members: int) -> "Zoo":
        """Keep the first `members`; the arrays stay on disk."""
        return replace(self, **{name: getattr(self, name)[:members] for name in ARRAYS})

    def save(self, folder: Path, *, sidecars: Callable[[Path], Any] | None = None, force: bool = False) -> None:
        """Write a zoo's folder; `sidecars(folder)` adds files to it."""
        with staged(folder, force=force) as out:
            out.mkdir()
            for name in ARRAYS:
                np.save(out / f"{name}.npy", getattr(self, name))
            specs = {"pieces": self.spec, "whole": self.whole}
            pieces = {name: spec and [asdict(p) for p in spec.pieces] for name, spec in specs.items()}
            about = {"about": dict(self.about)} if self.about else {}
            write_json(out / "zoo.json", {"net": self.net and asdict(self.net)} | pieces | about)
            if sidecars:
                sidecars(out)


def flat(spec: TokenSpec, tokens: np.ndarray) -> np.ndarray:
    """Remove the padding: [..., rows, length] -> [..., count]."""
    return np.asarray(tokens[..., spec.mask], np.float32)


def zoo_folder(path: str | Path) -> Path:
    """Folder of a zoo: of the run that made it, or itself."""
    folder = Path(path).expanduser()
    return folder / "zoo" if (folder / "zoo" / "zoo.json").is_file() else folder


def open_zoo(folder: Path) -> Zoo:
    """Open a zoo written by `Zoo.save`, memory-mapped; of a run, its zoo.

    Raises InputError when it is none, or files do not fit.
    """
    folder = zoo_folder(folder)
    if not (folder / "zoo.json").is_file():
        make = f"(heirloom train weightgen/zoo --run {folder.parent} makes one)"
        raise InputError(f"{folder} is no zoo: it has no zoo.json {make}")
    about = read_json(folder / "zoo.json")
    try:
        arrays = {name: mapped(folder / f"{name}.npy") for name in ARRAYS}
        cfg = NetConfig(**about["net"]) if about["net"] else None
        whole = TokenSpec.of(about["whole"]) if about.get("whole") else None
        zoo = Zoo(**arrays, net=cfg, spec=TokenSpec.of(about["pieces"]), whole=whole, about=about.get("about", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is a damaged zoo ({str(error).splitlines()[0]}); make it again") from error
    shape, sizes = zoo.weights.shape, {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1 or shape[1:] != (zoo.spec.count,) or zoo.classes.ndim != 2:
        needed = f"rows of {shape[1:]} for {zoo.spec.count} weights"
        raise InputError(f"{folder} is a damaged zoo ({sizes}, {needed}); make it again")
    return zoo


def open_with_bank(folder: Path) -> tuple[Zoo, Bank]:
    """Open a zoo and the bank its networks were trained on, and check both before a training.

    Raises InputError for networks with NaN or infinity, and for networks without a class or with one that is not in the
    bank.
    """
    folder = zoo_folder(folder)
    zoo, bank = open_zoo(folder), Bank.load(folder)
    if not len(zoo) or not zoo.classes.shape[1]:
        has = f"{len(zoo)} networks of {zoo.classes.shape[1]} classes"
        raise InputError(f"{folder} has {has}: a training needs their classes; make it again")
    step = max(2**24 // max(zoo.spec.count, 1), 1)
    finite = ((at, np.isfinite(zoo.weights[at : at + step]).all(1)) for at in range(0, len(zoo), step))
    bad = [at + int(i) for at, rows in finite for i in np.flatnonzero(~rows)]
    if bad:
        known = zoo.about.get("members", [])
        named = listed(known[i] if len(known) == len(zoo) else str(i) for i in bad)
        which = f"{len(bad)} of {len(zoo)} networks have NaN or infinity ({named})"
        raise InputError(f"{folder}: {which}; make the zoo again without them")
    low, high = int(zoo.classes.min()), int(zoo.classes.max())
    if low < 0 or high >= len(bank.names):
        of = f"{low} to {high}, its bank knows {len(bank.names)}"
        raise InputError(f"{folder}: its networks are of classes {of}; make the zoo again")
    if not np.isfinite(bank.features).all():
        raise InputError(f"{folder}: its bank of features has NaN or infinity; make the zoo again")
    return zoo, bank


def by_chunk(zoo: Zoo) -> Zoo:
    """Make each chunk a member, known by its number."""
    rows = zoo.tokens(slice(None)).reshape(-1, zoo.spec.length)
    numbers = np.tile(np.arange(zoo.spec.rows, dtype=np.int32), len(zoo))[:, None]
    quality, spec = np.repeat(zoo.quality, zoo.spec.rows), one_chunk(zoo.spec)
    new = Zoo(weights=rows, quality=quality, classes=numbers, net=None, spec=spec)
    return replace(new, whole=zoo.spec, about=zoo.about)


def head_tokens(cfg: NetConfig) -> TokenSpec:
    """Cut a head, an mlp or a cnn neuron by neuron."""
    return neurons(net(cfg).spec)


def pictures_of(zoo: str) -> Bank:
    """Open the inputs of a zoo's networks, pictures or features: held-out ones where they are stored."""
    folder = zoo_folder(zoo)
    names = (name for name in ("held", "pictures") if (folder / f"{name}.npz").is_file())
    return Bank.load(folder, next(names, "bank"))


def zoo_condition(folder: Path) -> str:
    """Read the condition of an imported zoo's members: text, label or chunk."""
    return str(read_json(folder / "tasks.json")["told"])

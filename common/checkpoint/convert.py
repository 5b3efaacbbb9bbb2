"""Between our folders and foreign checkpoints: recognise, open lazily, write, verify, and only then give the name away."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import weights
from common.checkpoint.torch_file import open_torch, write_torch
from common.checkpoint.weights import FILE, Tensors, read_json, write_json
from common.errors import InputError, VerificationError, nearest
from common.nn.functional import Functional, functional
from common.surgery.axes import Spec
from common.surgery.layout import Layout, View, own_tensors, own_views
from common.surgery.plan import Plan, Source
from common.surgery.report import provenance

COPY = Plan((("**", {}),))
_TORCH = (".pt", ".pth", ".bin")
TOLERANCE = 1e-4
TINY = 1e-30  # instead of a reference that is all zeros


@dataclass(frozen=True)
class Format:
    """One foreign format of a model family.

    layout: the table of names, or a function of the config where it depends on it.
    file: name of the weights inside a folder we write; its ending says whether torch, safetensors or numpy (.npz) writes it.
    read_config(tensors, folder): the model's config, or None when this is another format.
    write_config(cfg, folder): writes the format's own JSON files beside the weights.
    clean: brings the keys of a file in the wild to the layout's.
    wrapper: of a torch file, the key its tensors are under.
    complete(cfg, tensors): the tensors with what files of the wild leave out because it has no effect.
    """

    name: str
    layout: Layout | Callable[[Any], Layout]
    file: str
    read_config: Callable[[Tensors, Path], Any]
    write_config: Callable[[Any, Path], None]
    clean: Callable[[str], str] = lambda key: key
    wrapper: str = "state_dict"
    complete: Callable[[Any, Tensors], Tensors] = lambda cfg, tensors: tensors

    def layout_of(self, cfg: Any) -> Layout:
        return self.layout if isinstance(self.layout, Layout) else self.layout(cfg)


@dataclass(frozen=True)
class Check:
    """A comparison of our model with a reference on the same inputs; errors are relative to the reference's largest value."""

    passed: bool
    reference: str | None
    max_error: float | None = None
    mean_error: float | None = None
    cosine: float | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def compare(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, reference: str, libraries: Sequence[str]) -> Check:
    """Outputs [example, ...] of our model and of the reference, pair by pair; passed up to TOLERANCE. libraries: packages it used."""
    errors = [np.abs(a - b) / max(np.abs(b).max(), TINY) for a, b in zip(ours, theirs, strict=True)]
    largest = max(float(error.max()) for error in errors)
    return Check(
        passed=largest <= TOLERANCE,
        reference=reference,
        max_error=largest,
        mean_error=float(np.mean([error.mean() for error in errors])),
        cosine=min(_cosine(a, b) for a, b in zip(ours, theirs, strict=True)),
        versions={name: version(name) for name in ("jax", *libraries)},
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the two values of each example; the smallest. Two zeros, as a fresh diffusion model predicts, are the same."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.where((a == b).all(-1), 1.0, (a * b).sum(-1) / np.maximum(norms, TINY)).min())


@dataclass(frozen=True)
class Family:
    """A model family: its module, config type, and foreign formats.

    companions(source, destination, format): carries tokenizer and preprocessing along, into the format named.
    verify(cfg, params, file, format): compares our model with the reference that reads the foreign file.
    parameters(spec): counts by part and in total. macs(cfg, spec): multiply-accumulates of one example.
    embedded: the weights folders that come with the package, by name.
    """

    name: str
    module: Callable[..., Any]
    config: Callable[[Mapping[str, Any]], Any]
    formats: tuple[Format, ...]
    companions: Callable[["Donor", Path, str], None]
    verify: Callable[[Any, Mapping[str, Any], Path, str], Check]
    parameters: Callable[[Spec], dict[str, int]]
    macs: Callable[[Any, Spec], int]
    embedded: Mapping[str, Path] = field(default_factory=dict)

    def format(self, name: str) -> Format:
        for format in self.formats:
            if format.name == name:
                return format
        raise InputError(f"no format {name!r} for {self.name} models; there are heirloom, {', '.join(f.name for f in self.formats)}")


@dataclass(frozen=True)
class Donor:
    """A checkpoint opened lazily: its parameters are views of memory-mapped files until they are read.

    `format` is "heirloom" for a folder of ours; `path` is what was named, `file` the weights in it.
    """

    family: Family
    cfg: Any
    model: Functional
    source: Source
    format: str
    path: Path
    file: Path

    @property
    def folder(self) -> Path:
        """Where tokenizer and preprocessing lie, if anywhere."""
        return self.path if self.path.is_dir() else self.path.parent


def open_donor(path: Path, families: Sequence[Family], **overrides: Any) -> Donor:
    """Open a checkpoint of ours or of any known foreign format.

    overrides: fields of the config that a bare weights file cannot tell (`activation`).
    Raises InputError when nothing recognises it, and for missing, unexpected or misshapen tensors.
    """
    if path.is_dir() and weights.is_folder(path):
        return _open_ours(path, families)
    opened = {file: open_tensors(file) for file in weights_files(path)}
    for family in families:
        for format in family.formats:
            found = [(file, *read) for file, raw in opened.items() if (read := _recognise(format, raw, file))]
            if len(found) > 1:
                names = " and ".join(file.name for file, *_ in found)
                raise InputError(f"{path} holds {names}, both {family.name} models; name the file you mean")
            for file, cfg, tensors in found:
                cfg = _override(cfg, overrides)
                tensors = format.complete(cfg, tensors)
                model = functional(family.module, cfg)
                layout = format.layout_of(cfg)
                views = layout.view(tensors, model.spec, str(file))
                layout.check_values(tensors, model.spec, str(file))
                origin = {p: f"{file.name}:{key}" for p, key in layout.keys(model.spec).items()}
                return Donor(family, cfg, model, Source(_as_stored(model.spec, views), views, origin), format.name, path, file)
    known = ", ".join(f"{family.name} ({', '.join(f.name for f in family.formats)})" for family in families)
    sample = ", ".join(next(iter(opened.values())).keys() or ["none"])
    raise InputError(f"{path}: its tensors ({sample[:80]} ...) are of no known model; known are {known}")


def _override(cfg: Any, overrides: Mapping[str, Any]) -> Any:
    if not overrides:
        return cfg
    if not hasattr(cfg, "override"):
        raise InputError(f"{min(overrides)!r} cannot be set for this model, whose config.json tells all; leave it out")
    known = list(signature(cfg.override).parameters)
    if unknown := overrides.keys() - set(known):
        raise InputError(f"{min(unknown)!r} cannot be set for this model{nearest(min(unknown), known)} (there are {', '.join(known)})")
    return cfg.override(**overrides)


def _recognise(format: Format, raw: Tensors, file: Path) -> tuple[Any, Tensors] | None:
    """The config and the tensors under clean keys, or None when the file is of another format."""
    tensors = {format.clean(key): value for key, value in raw.items()}
    try:
        cfg = format.read_config(tensors, file.parent)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if cfg is None:
        return None
    if len(tensors) != len(raw):
        raise InputError(f"{file}: two tensors have the same name once wrappers are taken off")
    return cfg, tensors


def weights_files(path: Path) -> list[Path]:
    """The weights of a checkpoint: the file itself, or those of a folder (an index of shards, safetensors before pickles).

    Raises InputError when there are none.
    """
    if path.is_file():
        return [path]
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth", "*.npz"):
        if found := sorted(p for p in path.glob(pattern) if not p.name.startswith(".")):
            return found
    raise InputError(f"{path} holds no weights (no .safetensors, .bin, .pt, .pth or .npz)")


def open_tensors(file: Path) -> Tensors:
    """The tensors of a weights file under the names it gives them, memory-mapped."""
    if file.name.endswith(".index.json"):
        return weights.open_sharded(file, open_tensors)
    if file.suffix == ".npz":
        return weights.open_npz(file)
    return open_torch(file) if file.suffix in _TORCH else weights.open_safetensors(file)


def convert(donor: Donor, destination: Path, to: str, *, force: bool = False, verify: bool = True) -> Check:
    """Write the donor as a weights folder in another format; bits are kept. Returns what the verification found.

    Raises InputError for bad input and a full disk, VerificationError past tolerance: then nothing stands under the name.
    """
    family = donor.family
    if to == donor.format:
        raise InputError(f"the source is in the {to} format already")
    format = None if to == "heirloom" else family.format(to)
    with weights.staged(destination, force=force) as folder:
        folder.mkdir()
        if format is None:
            _write_ours(donor, folder)
        else:
            _write_foreign(donor, format, folder)
        family.companions(donor, folder, to)
        check = Check(passed=True, reference=None, note="not asked for")
        if verify:
            check = _verify(donor, folder, to)
        write_json(folder / "verify.json", asdict(check) | {"source": hashes(donor.file)})
        if not check.passed:
            why = check.note or f"features differ from those of {check.reference} by {check.max_error:.1e}"
            raise VerificationError(f"{destination} was not written: {why}")
    return check


def hashes(file: Path) -> dict[str, str]:
    """SHA-256 of a weights file, or of every shard an index names, by file name."""
    shards = sorted(set(read_json(file)["weight_map"].values())) if file.name.endswith(".index.json") else [file.name]
    return {name: weights.sha256(file.parent / name) for name in shards}


def _verify(donor: Donor, folder: Path, to: str) -> Check:
    """What was written must come back bit for bit, and compute what the reference that reads the foreign side computes."""
    written = open_donor(folder, [donor.family])
    for path, value in donor.source.values.items():
        if not np.array_equal(_bits(np.asarray(value)), _bits(np.asarray(written.source.values[path]))):
            return Check(passed=False, reference="what was written", missing=(path,), note=f"{path} does not come back as it was written")
    foreign = donor if to == "heirloom" else written
    return donor.family.verify(donor.cfg, donor.source.values, foreign.file, foreign.format)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _open_ours(path: Path, families: Sequence[Family]) -> Donor:
    opened = weights.open_folder(path)
    family = next((f for f in families if f.name == opened.method), None)
    if family is None:
        known = ", ".join(f.name for f in families)
        raise InputError(f"{path}: made by the method {opened.method!r}, which is not installed (here: {known})")
    cfg = family.config(opened.model)
    model = functional(family.module, cfg)
    views = own_views(opened.tensors, model.spec, str(path / FILE))
    return Donor(family, cfg, model, Source(_as_stored(model.spec, views), views), "heirloom", path, path / FILE)


def _as_stored(spec: Spec, views: Mapping[str, View]) -> Spec:
    """The spec with the dtypes of the file."""
    return {path: replace(leaf, dtype=np.dtype(views[path].dtype)) for path, leaf in spec.items()}


def _write_ours(donor: Donor, folder: Path) -> None:
    spec, values = donor.source.spec, donor.source.values
    with weights.create_safetensors(folder / FILE, own_tensors(spec)) as out:
        for path, view in own_views(out, spec, str(folder)).items():
            view.write(values[path])
    weights.write_config(folder, donor.family.name, donor.cfg)
    record = provenance(COPY.resolve(donor.source, spec))
    write_json(folder / "provenance.json", {"source": str(donor.path), "format": donor.format} | record)


def _write_foreign(donor: Donor, format: Format, folder: Path) -> None:
    format.write_config(donor.cfg, folder)  # first: it refuses what the format cannot say
    spec, values = donor.source.spec, donor.source.values
    layout = format.layout_of(donor.cfg)
    shapes = layout.foreign(spec)

    def fill(out: Tensors) -> None:
        for path, view in layout.view(out, spec).items():
            view.write(values[path])
        for key, value in layout.constant.items():
            out[key][...] = value

    if format.file.endswith((*_TORCH, ".npz")):
        # torch and numpy want every tensor at once: mapped from a file that goes again, they are not in memory.
        with weights.create_safetensors(folder / FILE, shapes) as out:
            fill(out)
            if format.file.endswith(".npz"):
                np.savez(folder / format.file, **out)  # type: ignore[arg-type]
            else:
                write_torch(folder / format.file, out, format.wrapper)
        (folder / FILE).unlink()
    else:
        with weights.create_safetensors(folder / format.file, shapes) as out:
            fill(out)


def describe(path: Path) -> dict[str, Any] | None:
    """The provenance saved beside a weights folder, if it has one."""
    file = path / "provenance.json"
    return read_json(file) if file.is_file() else None

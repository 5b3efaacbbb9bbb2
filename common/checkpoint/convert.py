"""Between our folders and foreign checkpoints: recognise, open lazily, write, verify, and only then give the name away."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.staging import staged
from heirloom.common.checkpoint.unwrap import Weights, clean_names, open_weights, weights_files, write_torch
from heirloom.common.checkpoint.verify import Check, guarded
from heirloom.common.checkpoint.weights import FILE, Tensors, read_json, write_json
from heirloom.common.errors import InputError, Remark, VerificationError, nearest, remark
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.layout import Layout, View, own_tensors, own_views
from heirloom.common.surgery.plan import Plan, Source
from heirloom.common.surgery.report import provenance
from heirloom.common.typed import Config

COPY = Plan((("**", {}),))


@dataclass(frozen=True)
class Found:
    """A foreign checkpoint while its config is read.

    tensors: under clean names. folder: where its JSON files are. about: what a torch file holds next to the tensors.
    """

    tensors: Tensors
    folder: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    def json(self, name: str) -> Fields | None:
        """A JSON file next to the weights, or None."""
        file = self.folder / name
        return Fields.load(file) if file.is_file() else None


@dataclass(frozen=True)
class Guess:
    """A setting that neither weights nor config tell: what was taken for it, and why. `convert --set name=VALUE` overrides it.

    value: None where nothing can be taken for it: then it must be set.
    """

    name: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value} is a guess: {self.why} (--set {self.name}=VALUE overrides it)"


@dataclass(frozen=True)
class Read:
    """The config of a foreign checkpoint, and what in it was guessed."""

    cfg: Any
    guesses: tuple[Guess, ...] = ()


@dataclass(frozen=True)
class Lookalike:
    """Checkpoints that are not read, recognised by a glob of their tensors' names, and what to do with them."""

    keys: str
    advice: str


@dataclass(frozen=True)
class Format:
    """One foreign format of a model family.

    layout: the table of names, or a function of the config where it depends on it.
    file: name of the weights inside a folder we write; its ending says whether torch, safetensors or numpy (.npz) writes it.
    read_config(found): the model's config, or None when this is another format.
    write_config(cfg, folder): writes the format's own JSON files next to the weights.
    clean: brings the keys of a file in the wild to the layout's, once the usual wrappers are off.
    wrapper: of a torch file, the key its tensors are under; None: the file is the dictionary of tensors.
    complete(cfg, tensors): the tensors with what files of the wild leave out because it has no effect.
    """

    name: str
    layout: Layout | Callable[[Any], Layout]
    file: str
    read_config: Callable[[Found], Read | None]
    write_config: Callable[[Any, Path], None]
    clean: Callable[[str], str] = lambda key: key
    wrapper: str | None = "state_dict"
    complete: Callable[[Any, Tensors], Tensors] = lambda cfg, tensors: tensors

    def layout_of(self, cfg: Config) -> Layout:
        return self.layout if isinstance(self.layout, Layout) else self.layout(cfg)


@dataclass(frozen=True)
class Family:
    """A model family: its module, config type, and foreign formats.

    sidecars(source, destination, format): carries tokenizer and preprocessing along, into the format named.
    verify(cfg, params, file, format): compares our model with the reference that reads the foreign file.
    parameters(spec): counts by part and in total. macs(cfg, spec): multiply-accumulates of one example.
    embedded: the weights folders that come with the package, by name.
    lookalikes: checkpoints that are close to this family and not read, with what to do.
    """

    name: str
    module: Callable[..., Any]
    config: Callable[[Mapping[str, Any]], Any]
    formats: tuple[Format, ...]
    sidecars: Callable[["Donor", Path, str], None]
    verify: Callable[[Any, Mapping[str, Any], Path, str], Check]
    parameters: Callable[[Spec], dict[str, int]]
    macs: Callable[[Any, Spec], int]
    embedded: Mapping[str, Path] = field(default_factory=dict)
    lookalikes: tuple[Lookalike, ...] = ()

    def format(self, name: str) -> Format:
        for format in self.formats:
            if format.name == name:
                return format
        raise InputError(f"no format {name!r} for {self.name} models; there are heirloom, {', '.join(f.name for f in self.formats)}")


@dataclass(frozen=True)
class Donor:
    """A checkpoint opened lazily: its parameters are views of memory-mapped files until they are read.

    `format` is "heirloom" for a folder of ours; `path` is what was named, `file` the weights in it. guesses: settings of `cfg` that the
    checkpoint does not tell.
    """

    family: Family
    cfg: Any
    model: Functional
    source: Source
    format: str
    path: Path
    file: Path
    guesses: tuple[Guess, ...] = ()

    @property
    def folder(self) -> Path:
        """Where tokenizer and preprocessing lie, if anywhere."""
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Outline:
    """A checkpoint without its weights: enough to compile a step with it as teacher."""

    family: Family
    cfg: Any
    model: Functional


def open_donor(path: Path, families: Sequence[Family], **overrides: Any) -> Donor:
    """Open a checkpoint of ours or of any known foreign format.

    overrides: fields of the config that take the place of what was read or guessed (`activation`).
    Remarks what was unwrapped and what was guessed. Raises InputError when nothing recognises it, and for missing, unexpected or misshapen
    tensors.
    """
    if path.is_dir() and weights.is_folder(path):
        return _open_ours(path, families, overrides)
    opened = {file: _open_clean(file) for file in weights_files(path)}
    for family in families:
        for format in family.formats:
            found = {file: known for file, raw in opened.items() if (known := _recognise(format, raw, file))}
            if len(found) > 1:
                names = " and ".join(file.name for file in found)
                raise InputError(f"{path} holds {names}, both {family.name} models; name the file you mean")
            for file, (read, clean) in found.items():
                return _opened(family, format, path, file, clean, read, overrides)
    raise InputError(f"{path}: {_unknown(families, [key for raw in opened.values() for key in raw.tensors])}")


def _open_clean(file: Path) -> Weights:
    try:
        return clean_names(open_weights(file))
    except InputError as error:
        raise error if str(file) in str(error) else InputError(f"{file}: {error}") from error


def _recognise(format: Format, raw: Weights, file: Path) -> tuple[Read, Weights] | None:
    """The config, and the tensors under the layout's keys, or None when the file is of another format."""
    tensors = {format.clean(key): value for key, value in raw.tensors.items()}
    try:
        read = format.read_config(Found(tensors, file.parent, raw.about))
    except InputError as error:
        raise InputError(str(error) if str(file.parent) in str(error) else f"{file}: {error}") from error
    if read is None:
        return None
    if len(tensors) != len(raw.tensors):
        raise InputError(f"{file}: two tensors have the same name once wrappers are taken off")
    return read, replace(raw, tensors=tensors)


def _opened(family: Family, format: Format, path: Path, file: Path, raw: Weights, read: Read, overrides: Mapping[str, Any]) -> Donor:
    cfg = _override(read.cfg, overrides)
    guesses = tuple(guess for guess in read.guesses if guess.name not in overrides)
    for unknown in (guess for guess in guesses if guess.value is None):
        raise InputError(f"{file}: {unknown.why}: say it (--set {unknown.name}=VALUE)")
    tensors = format.complete(cfg, raw.tensors)
    model = _model(family, cfg, file)
    layout = format.layout_of(cfg)
    views = layout.view(tensors, model.spec, str(file))
    layout.check_values(tensors, model.spec, str(file))
    origin = {p: f"{file.name}:{key}" for p, key in layout.keys(model.spec).items()}
    source = Source(_as_stored(model.spec, views), views, origin)
    for text in (*raw.notes, *guesses):
        remark(f"{file}: {text}")
    return Donor(family, cfg, model, source, format.name, path, file, guesses)


def _model(family: Family, cfg: Any, path: Path) -> Functional:
    try:
        return functional(family.module, cfg)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _unknown(families: Sequence[Family], keys: Sequence[str]) -> str:
    """Why a checkpoint is not read: the nearest thing it is known to be, or a sample of its tensors."""
    for lookalike in (one for family in families for one in family.lookalikes):
        if any(fnmatchcase(key, lookalike.keys) for key in keys):
            return lookalike.advice
    known = ", ".join(f"{family.name} ({', '.join(f.name for f in family.formats)})" for family in families if family.formats)
    sample = f"its tensors ({', '.join(keys)[:80]} ...) are" if keys else "it holds no tensors, which is"
    return f"{sample} of no known model; known are {known}"


def _override(cfg: Any, overrides: Mapping[str, Any]) -> Any:
    if not overrides:
        return cfg
    if not hasattr(cfg, "override"):
        raise InputError(f"{min(overrides)!r} cannot be set for this model, whose config.json tells all; leave it out")
    known = list(signature(cfg.override).parameters)
    if unknown := overrides.keys() - set(known):
        raise InputError(f"{min(unknown)!r} cannot be set for this model{nearest(min(unknown), known)} (there are {', '.join(known)})")
    return cfg.override(**overrides)


def convert(donor: Donor, destination: Path, to: str, *, force: bool = False, verify: bool = True) -> Check:
    """Write the donor as a weights folder in another format; bits are kept. Returns what the verification found.

    Raises InputError for bad input and a full disk, VerificationError past tolerance: then nothing stands under the name.
    """
    family = donor.family
    if to == donor.format:
        raise InputError(f"the source is in the {to} format already")
    format = None if to == "heirloom" else family.format(to)
    with staged(destination, force=force) as folder:
        folder.mkdir()
        if format is None:
            _write_ours(donor, folder)
        else:
            _write_foreign(donor, format, folder)
        family.sidecars(donor, folder, to)
        check = Check(passed=True, reference=None, note="not asked for")
        if verify:
            check = _verify(donor, folder, to)
        check = replace(check, guessed=tuple(map(str, donor.guesses)))
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)  # of the source, they are said already; this folder's name is about to go
        written = open_donor(folder, [donor.family])
    for path, value in donor.source.values.items():
        if not np.array_equal(_bits(np.asarray(value)), _bits(np.asarray(written.source.values[path]))):
            return Check(passed=False, reference="what was written", missing=(path,), note=f"{path} does not come back as it was written")
    foreign = donor if to == "heirloom" else written
    return guarded(lambda: donor.family.verify(donor.cfg, donor.source.values, foreign.file, foreign.format))


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _open_ours(path: Path, families: Sequence[Family], overrides: Mapping[str, Any]) -> Donor:
    opened = weights.open_folder(path)
    family = next((f for f in families if f.name == opened.method), None)
    if family is None:
        known = ", ".join(f.name for f in families)
        raise InputError(f"{path}: made by the method {opened.method!r}, which is not installed (here: {known})")
    try:
        cfg = _override(family.config(opened.model), overrides)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    model = _model(family, cfg, path)
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

    if not format.file.endswith(".safetensors"):
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

"""Opens checkpoints of ours and of foreign formats lazily, and converts between them with verification."""

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.family import Donor, Family, Format, Found, Read
from heirloom.common.checkpoint.flax_files import SUFFIX, write_flax
from heirloom.common.checkpoint.names import clean_names, without_common
from heirloom.common.checkpoint.quantized import quantized_views
from heirloom.common.checkpoint.unwrap import Weights, open_weights, weights_files, write_torch
from heirloom.common.checkpoint.verify import OWN, RENAMED, UNQUANTIZED, Check, copy_companions, guarded
from heirloom.common.checkpoint.weights import FILE, Tensors
from heirloom.common.errors import InputError, Remark, VerificationError, nearest, remark
from heirloom.common.fetch import origin
from heirloom.common.files import read_json, sha256, staged, write_json
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.layout import Tensor, View, own_tensors, own_views
from heirloom.common.surgery.plan import Plan, Source
from heirloom.common.surgery.report import provenance

COPY = Plan((("**", {}),))
OURS = ("heirloom", *weights.ORBAX)  # formats with our names


def open_donor(path: Path, families: Sequence[Family], **overrides: Any) -> Donor:
    """Opens a checkpoint of ours or of any known foreign format; of a run, its model.

    overrides: settings that replace those that were read or guessed (`activation`). Remarks wrappers that were removed,
    such as an attribute that all names begin with, and guesses. Raises InputError when no family recognises the
    checkpoint, and for missing, unexpected or misshapen tensors.
    """
    path = weights.of_run(path)
    if path.is_dir() and weights.is_folder(path):
        return _open_ours(path, families, overrides)
    opened, failed = _open_all(weights_files(path))
    inner = opened
    while inner:
        for family in families:
            for format in family.formats:
                found = {f: known for f, raw in inner.items() if (known := _recognise(format, raw, f, overrides))}
                if len(found) > 1:
                    names = " and ".join(file.name for file in found)
                    raise InputError(f"{path} holds {names}, both {family.name} models; name the file you mean")
                for file, (read, clean) in found.items():
                    for error in failed:
                        remark(f"not read: {error}")
                    return _opened(family, format, path, file, clean, read, overrides)
        inner = {file: one for file, raw in inner.items() if (one := without_common(raw))}
    if failed:
        raise failed[0]
    if parts := [part for file, raw in opened.items() for part in _parts(raw, file, families)]:
        raise InputError(f"{path}: a whole model is under {' and under '.join(parts)}; save one alone, by that name")
    raise InputError(f"{path}: {_unknown(families, [key for raw in opened.values() for key in raw.tensors])}")


def _open_all(files: Sequence[Path]) -> tuple[dict[Path, Weights], list[InputError]]:
    """Opens the weights files of a checkpoint; returns the errors of those that are none, where others are."""
    opened, failed = dict[Path, Weights](), list[InputError]()
    for file in files:
        try:
            opened[file] = _open_clean(file)
        except InputError as error:
            failed.append(error)
    if not opened:
        raise failed[0]
    return opened, failed


def _open_clean(file: Path) -> Weights:
    try:
        clean = clean_names(open_weights(file))
    except InputError as error:
        raise error if str(file) in str(error) else InputError(f"{file}: {error}") from error
    if any(re.search(r"\.(lora_[AB]|base_layer)\b|\blora_(down|up)\b", key) for key in clean.tensors):
        merge = "merge them into the model (peft's merge_and_unload), save and convert that"
        raise InputError(f"{file}: holds the matrices of an adapter, LoRA: {merge}")
    return clean


def _recognise(
    format: Format, raw: Weights, file: Path, settings: Mapping[str, Any] | None = None
) -> tuple[Read, Weights] | None:
    """Returns the config, and the tensors under the layout's keys; None when the file has another format."""
    tensors = {format.clean(key): value for key, value in raw.tensors.items()}
    try:
        read = format.read_config(Found(tensors, file.parent, raw.about, settings or {}))
    except InputError as error:
        raise InputError(str(error) if str(file.parent) in str(error) else f"{file}: {error}") from error
    if read is None:
        return None
    if len(tensors) != len(raw.tensors):
        raise InputError(
            f"{file}: two tensors have the same name without wrappers; save the model's state_dict() alone"
        )
    return read, replace(raw, tensors=tensors)


def _parts(raw: Weights, file: Path, families: Sequence[Family]) -> list[str]:
    """Returns the attributes of a module that are whole models, as in a training state of student and teacher."""
    found = []
    for name in dict.fromkeys(key.partition(".")[0] for key in raw.tensors if "." in key):
        inside = {key.partition(".")[2]: value for key, value in raw.tensors.items() if key.startswith(f"{name}.")}
        for family in families:
            with suppress(InputError):
                clean = clean_names(replace(raw, tensors=inside))
                if any(_recognise(format, clean, file) for format in family.formats):
                    found.append(f"'{name}.' ({family.name})")
    return found


def _opened(
    family: Family, format: Format, path: Path, file: Path, raw: Weights, read: Read, overrides: Mapping[str, Any]
) -> Donor:
    cfg = _override(read.cfg, overrides)
    guesses = tuple(guess for guess in read.guesses if guess.name not in overrides)
    for unknown in (guess for guess in guesses if guess.value is None):
        raise InputError(f"{file}: {unknown.why}; give --set {unknown.name}=VALUE to heirloom convert")
    try:
        tensors = format.complete(cfg, raw.tensors)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    model = _model(family, cfg, file)
    layout = format.layout_of(cfg)
    try:
        views = layout.view(tensors, model.spec, str(file))
    except InputError as error:
        raise InputError("; ".join((str(error), *raw.notes))) from error
    layout.check_values(tensors, model.spec, str(file))
    origin = {p: f"{file.name}:{key}" for p, key in layout.keys(model.spec).items()}
    source = Source(_as_stored(model.spec, views), views, origin)
    for text in (*raw.notes, *guesses):
        remark(f"{file}: {text}")
    about: dict[str, Any] = dict(guesses=guesses, known=read.known)
    return Donor(family=family, cfg=cfg, model=model, source=source, format=format.name, path=path, file=file, **about)


def _model(family: Family, cfg: Any, path: Path) -> Functional:
    try:
        return functional(family.module, cfg)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _unknown(families: Sequence[Family], keys: Sequence[str]) -> str:
    """Explains why a checkpoint cannot be read: advice for a known lookalike, or a sample of its tensors."""
    for lookalike in (one for family in families for one in family.lookalikes):
        if any(fnmatchcase(key, lookalike.keys) for key in keys):
            return lookalike.advice
    known = ", ".join(
        f"{family.name} ({', '.join(f.name for f in family.formats)})" for family in families if family.formats
    )
    sample = f"its tensors ({', '.join(keys)[:80]} ...) match no known model" if keys else "it has no tensors"
    return f"{sample}; known are {known}"


def _override(cfg: Any, overrides: Mapping[str, Any]) -> Any:
    if not overrides:
        return cfg
    if not hasattr(cfg, "override"):
        raise InputError(
            f"{min(overrides)!r} cannot be set for this model, whose config.json has all settings; leave it out"
        )
    known = list(signature(cfg.override).parameters)
    if unknown := overrides.keys() - set(known):
        raise InputError(
            f"{min(unknown)!r} cannot be set for this model{nearest(min(unknown), known)} (there are"
            f" {', '.join(known)})"
        )
    return cfg.override(**overrides)


def convert(donor: Donor, destination: Path, to: str, *, force: bool = False, verify: bool = True) -> Check:
    """Writes the donor as a weights folder in another format, bit for bit, and returns the result of the verification.

    Raises InputError for bad input and a full disk, and VerificationError above tolerance; `destination` is then not
    written.
    """
    family = donor.family
    if to == donor.format:
        raise InputError(f"the source is in the {to} format already")
    if donor.quantized:
        raise InputError(f"{donor.path} is quantised ({donor.quantized}); convert the weights it was made from")
    format = None if to in OURS else family.format(to)
    with staged(destination, force=force, inputs=[donor.path]) as folder:
        folder.mkdir()
        if format is None:
            _write_ours(donor, folder, to)
        else:
            _write_foreign(donor, format, folder)
        family.sidecars(donor, folder, "heirloom" if format is None else to)
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
    """Returns the SHA-256 of a weights file, or of each shard or file that it consists of, by file name."""
    return {name: sha256(file.parent / name) for name in parts(file)}


def files(file: Path) -> list[Path]:
    """Returns the paths of what a weights file consists of."""
    return [file.parent / name for name in parts(file)]


def parts(file: Path) -> list[str]:
    """Returns the names of what a weights file consists of: its shards, the files of a folder of orbax, or itself."""
    if file.is_dir():
        return sorted(part.relative_to(file.parent).as_posix() for part in file.rglob("*") if part.is_file())
    return sorted(set(read_json(file)["weight_map"].values())) if file.name.endswith(".index.json") else [file.name]


def _verify(donor: Donor, folder: Path, to: str) -> Check:
    """Checks that the written weights are read back bit for bit, and compares the foreign file with its reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)  # the source had the same remarks, and this folder's name is temporary
        written = open_donor(folder, [donor.family])
    omitted = () if to in OURS else donor.family.format(to).layout_of(donor.cfg).omit
    for path, value in ((p, v) for p, v in donor.source.values.items() if p not in omitted):
        if not np.array_equal(_bits(np.asarray(value)), _bits(np.asarray(written.source.values[path]))):
            note = f"{path} is not read back as it was written"
            return Check(passed=False, reference="what was written", missing=(path,), note=note)
    foreign = donor if to in OURS else written
    format = "heirloom" if foreign.format in OURS else foreign.format
    with _as_read(foreign) as file:
        check = guarded(lambda: donor.family.verify(donor.cfg, donor.source.values, file, format))
    by_library = check.reference not in (None, OWN, UNQUANTIZED) and not str(check.reference).endswith(RENAMED)
    return replace(check, reference=f"{check.reference}{RENAMED}") if by_library and file != foreign.file else check


@contextmanager
def _as_read(donor: Donor) -> Iterator[Path]:
    """The weights file of a checkpoint for a reference: itself, or one without the wrappers that were removed from its
    names, which no library expects.
    """
    if donor.format in OURS:
        yield donor.file
        return
    # Without what was saved next to the tensors, which was understood when it was opened.
    raw, format = replace(_open_clean(donor.file), about={}), donor.family.format(donor.format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Remark)  # were said when it was opened
        while _recognise(format, raw, donor.file) is None and (inner := without_common(raw)):
            raw = inner
    if raw.tensors.keys() == open_weights(donor.file).tensors.keys():
        yield donor.file
        return
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / FILE
        copy_companions(donor.file, file.parent)
        save_file({k: np.asarray(v, order="C") for k, v in raw.tensors.items()}, file, {"format": "pt"})
        yield file


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _open_ours(path: Path, families: Sequence[Family], overrides: Mapping[str, Any]) -> Donor:
    opened = weights.open_folder(path)
    family = next((f for f in families if f.name == opened.method), None)
    if family is None:
        from heirloom.common.methods import families as installed

        known = ", ".join(f.name for f in families)
        if opened.method in {f.name for f in installed()}:
            raise InputError(f"{path} is a model of the kind {opened.method!r}; here one of these is needed: {known}")
        raise InputError(f"{path}: made by the method {opened.method!r}, which is not installed (here: {known})")
    try:
        cfg = _override(family.config(opened.model), overrides)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    model = _model(family, cfg, path)
    file = path / (weights.STATE if opened.stored else FILE)
    tensors = dict(weights.unpadded(opened.tensors, model.spec)) if opened.stored else opened.tensors
    views = (quantized_views if opened.quantized else own_views)(tensors, model.spec, str(file))
    source = Source(_as_stored(model.spec, views), views)
    place: dict[str, Any] = {"format": opened.stored or "heirloom", "path": path, "file": file}
    return Donor(family=family, cfg=cfg, model=model, source=source, **place, quantized=opened.quantized)


def _as_stored(spec: Spec, views: Mapping[str, View]) -> Spec:
    """Returns the spec with the dtypes of the file."""
    return {path: replace(leaf, dtype=np.dtype(views[path].dtype)) for path, leaf in spec.items()}


def _write_ours(donor: Donor, folder: Path, to: str) -> None:
    spec, values = donor.source.spec, donor.source.values
    if to in weights.ORBAX:
        _write_orbax(donor, folder, to)
    else:
        with weights.create_safetensors(folder / FILE, own_tensors(spec)) as out:
            for path, view in own_views(out, spec, str(folder)).items():
                view.write(values[path])
    weights.write_config(folder, donor.family.name, donor.cfg, stored=to if to in weights.ORBAX else "")
    write_json(folder / "provenance.json", copied_from(donor))


def _write_orbax(donor: Donor, folder: Path, to: str) -> None:
    """Writes the arrays of the module, zero-padded where layers differ in size, as NNX's state or as dictionaries."""
    from flax.traverse_util import unflatten_dict

    from heirloom.common.checkpoint.state import save_tree

    # orbax needs all arrays at once: a temporary memory-mapped file keeps them out of memory.
    shapes = {path: Tensor(leaf.shape, leaf.dtype) for path, leaf in donor.source.spec.items()}
    with weights.create_safetensors(folder / FILE, shapes) as out:
        for path, value in donor.source.values.items():
            out[path][...] = np.asarray(value)
        tree = donor.model.state(out) if to == "nnx" else unflatten_dict(out, sep="/")
        save_tree(folder / weights.STATE, tree)
    (folder / FILE).unlink()


def _write_foreign(donor: Donor, format: Format, folder: Path) -> None:
    format.write_config(donor.cfg, folder)  # first: it refuses what the format cannot express
    spec, values = donor.source.spec, donor.source.values
    layout = format.layout_of(donor.cfg)
    shapes = layout.foreign(spec)
    for path in sorted(spec.keys() & set(layout.omit)):
        remark(f"{path} is left out: files of the {format.name} format do not hold it")

    def fill(out: Tensors) -> None:
        for path, view in layout.view(out, spec).items():
            view.write(values[path])
        for key, value in layout.constant.items():
            out[key][...] = value

    if not format.file.endswith(".safetensors"):
        # torch, numpy and Flax need all tensors at once: a temporary memory-mapped file keeps them out of memory.
        with weights.create_safetensors(folder / FILE, shapes) as out:
            fill(out)
            if format.file.endswith(".npz"):
                np.savez(folder / format.file, **out)  # type: ignore[arg-type]
            elif format.file.endswith(SUFFIX):
                write_flax(folder / format.file, out)
            else:
                write_torch(folder / format.file, out, format.wrapper)
        (folder / FILE).unlink()
    else:
        with weights.create_safetensors(folder / format.file, shapes) as out:
            fill(out)


def copied_from(donor: Donor) -> dict[str, Any]:
    """Returns the provenance of a copy of a checkpoint, in our format; first_format: before all conversions."""
    source = {"source": origin(donor.path), "format": donor.format, "first_format": first_format(donor)}
    return source | provenance(COPY.resolve(donor.source, donor.source.spec))


def kept_provenance(donor: Donor) -> dict[str, Any] | None:
    """Returns the provenance of a model that is written again after it was loaded; None for one trained here."""
    return describe(donor.folder) if donor.format in OURS else copied_from(donor)


def first_format(donor: Donor) -> str:
    """Returns the format of the file that weights were first converted from; one of OURS for models trained here."""
    if donor.format not in OURS:
        return donor.format
    record = describe(donor.folder) or {}
    return str(record.get("first_format") or record.get("format") or donor.format)


def describe(path: Path) -> dict[str, Any] | None:
    """Reads the provenance of a weights folder; None where it has none."""
    file = path / "provenance.json"
    return read_json(file) if file.is_file() else None

"""`heirloom convert SOURCE DEST --quantize int8`: writes a weights folder with int8 kernels, and measures the error."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import copied_from, hashes, open_donor, parts
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.quantized import QuantizedView, quantized_tensors, write_quantized
from heirloom.common.checkpoint.verify import UNQUANTIZED, Check, compare
from heirloom.common.checkpoint.weights import FILE
from heirloom.common.errors import InputError, VerificationError
from heirloom.common.files import read_json, staged, write_json
from heirloom.common.nn.quantized import INT8

LEAST_COSINE = 0.95  # between outputs before and after: below this, the quantised model is another model


def quantize_folder(donor: Donor, destination: Path, *, force: bool = False, verify: bool = True) -> Check:
    """Writes the donor as a weights folder with int8 kernels; returns how far its outputs are from the donor's.

    Raises InputError for a model that cannot be quantised, for NaN and a full disk, and VerificationError for outputs
    that are not finite or have a cosine below 0.95 with the donor's; `destination` is then not written.
    """
    family, spec = donor.family, donor.source.spec
    if donor.quantized:
        raise InputError(f"{donor.path} is quantised already ({donor.quantized}); give the weights it was made from")
    if family.outputs is None:
        raise InputError(f"{donor.path}: {family.name} models are not quantised, since their outputs are not compared")
    tensors = quantized_tensors(spec)
    with staged(destination, force=force, inputs=[donor.path]) as folder:
        folder.mkdir()
        with weights.create_safetensors(folder / FILE, tensors) as out:
            write_quantized(out, donor.source.values, spec, str(donor.path))
        weights.write_config(folder, family.name, donor.cfg, INT8)
        write_json(folder / "provenance.json", copied_from(donor))
        family.sidecars(donor, folder, "heirloom")
        check = Check(passed=True, reference=None, note="not asked for")
        if verify:
            check = _compared(donor, folder)
        sizes = {"bytes": file_bytes(folder / FILE), "source_bytes": file_bytes(donor.file)}
        record = asdict(replace(check, guessed=tuple(map(str, donor.guesses)))) | {"source": hashes(donor.file)}
        write_json(folder / "verify.json", record | {"quantized": {"kernels": INT8} | sizes})
        if not check.passed:
            raise VerificationError(
                f"{destination} was not written: {check.sentence()}; --no-verify writes it all the same"
            )
    return check


def _compared(donor: Donor, folder: Path) -> Check:
    """Compares the outputs of the written folder, computed from its int8 kernels, with those of the donor."""
    assert donor.family.outputs is not None
    written = open_donor(folder, [donor.family])
    wide, narrow = (donor.family.outputs(donor.cfg, one.source.values) for one in (donor, written))
    kernels = [leaf for path, leaf in donor.source.spec.items() if _quantized(written.source.values[path])]
    share = sum(leaf.count for leaf in kernels) / sum(leaf.count for leaf in donor.source.spec.values())
    check = compare(narrow, wide, reference=UNQUANTIZED, libraries=())
    close = check.cosine is not None and check.cosine >= LEAST_COSINE  # false for NaN
    return replace(check, passed=close, note=f"{share:.1%} of the parameters are int8")


def _quantized(value: Any) -> bool:
    return isinstance(value, QuantizedView)


def file_bytes(file: Path) -> int:
    """Returns the size of a weights file, or of all that it consists of."""
    return sum((file.parent / name).stat().st_size for name in parts(file))


def sizes(donor: Donor) -> dict[str, Any]:
    """Returns what `heirloom inspect` reports of a checkpoint's file: `bytes`, and of a quantised one `quantized`,
    `source_bytes`, `max_error` and `cosine` (None where they were not measured).
    """
    out: dict[str, Any] = {"bytes": file_bytes(donor.file)}
    if donor.quantized:
        record = donor.folder / "verify.json"
        found = read_json(record) if record.is_file() else {}
        measured = found if found.get("reference") == UNQUANTIZED else {}
        about = found.get("quantized")
        source = about.get("source_bytes") if isinstance(about, dict) else None
        out |= {"quantized": donor.quantized, "source_bytes": source}
        out |= {name: measured.get(name) for name in ("max_error", "cosine")}
    return out


def sentence(sizes: dict[str, Any]) -> str:
    """Returns the line for the console."""
    text = f"{sizes['bytes'] / 1e6:,.1f} MB on disk"
    if "quantized" not in sizes:
        return text
    text += f", kernels in {sizes['quantized']}"
    if isinstance(sizes["source_bytes"], int):
        text += f" (before: {sizes['source_bytes'] / 1e6:,.1f} MB)"
    if not all(isinstance(sizes[name], float) for name in ("max_error", "cosine")):
        return f"{text}; how far its outputs are from the unquantised is not recorded"
    error = f"largest relative error {sizes['max_error']:.1e}, cosine {sizes['cosine']:.6f}"
    return f"{text}; outputs against the unquantised: {error}"

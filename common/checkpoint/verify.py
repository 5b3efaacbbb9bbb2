"""What a conversion was checked against, and how far it is from it.

*Verified* means: another library read the very file and its config and computed the same. A comparison with formulas of
our own is called that, for it shares our reading of the config.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from heirloom.common.checkpoint.flax_files import as_torch
from heirloom.common.checkpoint.names import clean_names
from heirloom.common.checkpoint.quantized import QuantizedView
from heirloom.common.checkpoint.unwrap import open_weights
from heirloom.common.errors import VerificationError
from heirloom.common.files import read_json
from heirloom.common.nn.quantized import QArray

TOLERANCE = 1e-4
TINY = 1e-30  # instead of a reference that is all zeros
OWN = "own formulas"
RENAMED = ", with tensors renamed here"  # after the library's name: it read the config by itself, not the file
UNQUANTIZED = "the unquantised weights"
NO_TORCH = "the extra 'torch' is not installed"


@dataclass(frozen=True)
class Check:
    """A comparison of our model with a reference on the same inputs; errors are relative to the reference's largest
    value.

    reference: the library that read the file and its config, followed by RENAMED where it reads no such file or names;
    OWN where only formulas of ours could serve; UNQUANTIZED of quantised weights; None where nothing was compared.
    guessed: settings that the file does not tell, with what was taken for them.
    """

    passed: bool
    reference: str | None
    max_error: float | None = None
    mean_error: float | None = None
    cosine: float | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    guessed: tuple[str, ...] = ()

    def sentence(self) -> str:
        """What to say of it on the console."""
        if self.reference is None:
            return f"not verified against a reference: {self.note}"
        found = f"largest relative error {self.max_error:.1e}, cosine {self.cosine:.6f}" + (
            f", {self.note}" if self.note else ""
        )
        if self.reference == OWN:
            return f"checked against our own formulas, not by another library: {found}"
        if self.reference == UNQUANTIZED:
            return f"compared with {UNQUANTIZED}: {found}"
        if self.reference.endswith(RENAMED):
            return f"checked against {self.reference}: {found}"
        return f"verified against {self.reference}: {found}"


def outputs(apply: Callable[..., Any], params: Mapping[str, Any], *inputs: np.ndarray) -> list[np.ndarray]:
    """The arrays that our model returns, parameters in f32 (quantised kernels as they are) and matmuls at highest
    precision. apply(params, *inputs): the model.
    """

    def full(value: Any) -> jax.Array | QArray:
        value = value.stored() if isinstance(value, QuantizedView) else value
        return value if isinstance(value, QArray) else jnp.asarray(np.asarray(value), jnp.float32)

    given = {name: full(value) for name, value in params.items()}
    with jax.default_matmul_precision("highest"):
        return [np.array(x) for x in jax.tree.leaves(jax.jit(apply)(given, *inputs))]


def against(
    reference: Callable[[], Check],
    ours: Sequence[np.ndarray],
    format: str,
    *,
    what: str,
    needs: Sequence[str] = ("torch",),
    missing: str = NO_TORCH,
) -> Check:
    """The check that `reference` makes of our outputs, or one without a reference where there can be none, with the
    reason.

    ours: the outputs, called `what`; one that is not finite fails the check. Files in our own format ("heirloom") have
    no reference, and without the libraries of `needs` none can be run; `missing` says so.
    """
    if not all(np.isfinite(x).all() for x in ours):
        return Check(passed=False, reference=None, note=f"{what} are not finite")
    if format == "heirloom" or not importable(*needs):
        return Check(passed=True, reference=None, note=f"structure and finiteness only: {missing}")
    return reference()


def compare(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, reference: str, libraries: Sequence[str]
) -> Check:
    """Outputs [example, ...] of our model and of the reference, pair by pair; passed up to TOLERANCE. libraries:
    packages it used.
    """
    if shapes := [(a.shape, b.shape) for a, b in zip(ours, theirs, strict=True) if a.shape != b.shape]:
        return Check(
            passed=False, reference=reference, note=f"outputs are {shapes[0][0]}, those of {reference} {shapes[0][1]}"
        )
    errors = [np.abs(a - b) / max(np.abs(b).max(), TINY) for a, b in zip(ours, theirs, strict=True)]
    largest = max(float(error.max()) for error in errors)
    return Check(
        passed=largest <= TOLERANCE,  # false for NaN
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


def importable(*names: str) -> bool:
    """Whether these libraries are installed and can be imported; timm and open_clip need a torchvision that fits."""
    try:
        for name in names:
            __import__(name)
    except Exception:  # a broken installation raises whatever it trips over, and then there is no reference here
        return False
    return True


def copy_companions(file: Path, folder: Path) -> None:
    """Copies the JSON files next to a weights file, such as its config, but no index of shards."""
    for companion in file.parent.glob("*.json"):
        if not companion.name.endswith(".index.json"):
            shutil.copy(companion, folder)


@contextmanager
def as_folder(file: Path, name: str, format: str = "") -> Iterator[Path]:
    """A folder in which `file` has the name that a library looks for, with the JSON files next to it.

    The library then reads this file, and its config, by itself. Wrapped weights are unwrapped for it, and those of Flax
    renamed, under `name`'s safetensors.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_companions(file, folder)
        found = open_weights(file)
        cleaned = clean_names(found)
        tensors = as_torch(cleaned.tensors) if format == "flax" else cleaned.tensors
        if file.suffix == ".json" and format != "flax":
            (folder / f"{name}.index.json").symlink_to(file.resolve())
            for shard in sorted(set(read_json(file)["weight_map"].values())):
                (folder / shard).symlink_to((file.parent / shard).resolve())
        elif file.suffix == ".safetensors" and cleaned.tensors.keys() == found.tensors.keys():
            (folder / name).symlink_to(file.resolve())
        else:
            save_file(
                {key: np.asarray(value, order="C") for key, value in tensors.items()},
                folder / name,
                {"format": "pt"},
            )
        yield folder


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars, which would mix with the lines of a command."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def guarded(check: Callable[[], Check]) -> Check:
    """The result of a check. Raises VerificationError, one line, where the reference cannot read the file or fails on
    it.
    """
    try:
        return check()
    except VerificationError:
        raise
    except Exception as error:  # the reference is somebody else's code: anything may come out of it
        why = " ".join(str(error).split())[:300]
        raise VerificationError(
            f"the reference could not be run on these weights ({type(error).__name__}: {why}); --no-verify converts"
            " without it"
        ) from error


def torch_activation(name: str) -> Callable[[Any], Any]:
    """The function of `heirloom.common.nn.mlp.ACTIVATIONS` in torch."""
    import torch
    import torch.nn.functional as F

    if name == "quick_gelu":
        return lambda x: x * torch.sigmoid(1.702 * x)
    if name == "silu":
        return F.silu
    return partial(F.gelu, approximate={"gelu": "none", "gelu_tanh": "tanh"}[name])


def reference_tensors(file: Path) -> dict[str, Any]:
    """The unwrapped tensors of a file as torch tensors in float32, for a reference that is built from its config."""
    import torch

    return {
        key: torch.from_numpy(np.array(value, np.float32))
        for key, value in clean_names(open_weights(file)).tensors.items()
    }

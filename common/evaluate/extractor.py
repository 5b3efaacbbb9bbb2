"""Opens Inception-v3 weights: a folder of ours, or the file that pytorch-fid uses."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.unwrap import open_tensors
from heirloom.common.errors import InputError
from heirloom.common.evaluate.inception import ADM, Inception, InceptionConfig
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.surgery.axes import Axes, Leaf, Spec
from heirloom.common.surgery.layout import Layout, own_views

METHOD = "inception"
BN_EPS = 1e-3


@dataclass(frozen=True)
class Extractor:
    """An Inception network with weights, f32 on the host."""

    cfg: InceptionConfig
    model: Functional
    params: Mapping[str, np.ndarray]


def open_extractor(path: Path) -> Extractor:
    """Opens our weights folder, or pytorch-fid's weights (`pt_inception-2015-12-05-*.pth`, or as safetensors).

    Raises InputError for a path that does not exist, a folder of another kind, and missing, unexpected or misshapen
    tensors.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; make one with scripts/convert_inception.py")
    if path.is_dir():
        folder = weights.open_folder(path)
        if folder.method != METHOD:
            needed = "not an Inception; scripts/convert_inception.py makes one"
            raise InputError(f"{path}: weights of the method {folder.method!r}, {needed}")
        try:
            cfg = InceptionConfig(**folder.model)
        except TypeError as error:
            raise InputError(f"{path / 'config.json'}: no Inception's config ({error}); convert it again") from error
        model = functional(Inception, cfg)
        views = own_views(folder.tensors, model.spec, str(path / weights.FILE))
        return Extractor(cfg, model, {name: np.asarray(view, np.float32) for name, view in views.items()})
    model = functional(Inception, ADM)
    return Extractor(ADM, model, fold(open_tensors(path), model.spec, str(path)))


def fold(tensors: weights.Tensors, spec: Spec, where: str) -> dict[str, np.ndarray]:
    """Converts pytorch-fid's tensors to parameters: folds batch norms into kernels and biases, in f64."""
    unfolded: dict[str, Leaf] = {}
    rows: list[tuple[str, ...]] = [("fc/kernel", "fc.weight")]
    parts = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}
    for path, leaf in spec.items():
        conv, _, kind = path.rpartition("/")
        key = conv.removeprefix("stem/").replace("/", ".")
        if kind == "kernel":
            unfolded[path] = leaf
            if conv != "fc":
                rows.append((path, f"{key}.conv.weight", "feature channel row col"))
            continue
        for ours, theirs in parts.items():
            unfolded[f"{conv}/{ours}"] = Leaf(axes=Axes.parse("feature"), shape=leaf.shape, dtype=leaf.dtype)
            rows.append((f"{conv}/{ours}", f"{key}.bn.{theirs}"))
    layout = Layout(name="pytorch-fid", rows=tuple(rows), ignore=("*.num_batches_tracked", "fc.bias", "AuxLogits.*"))
    found = {path: np.asarray(view, np.float64) for path, view in layout.view(tensors, unfolded, where).items()}
    folded = {"fc/kernel": found["fc/kernel"]}
    for conv in (path.removesuffix("/bias") for path in spec if path.endswith("/bias")):
        gain = found[f"{conv}/scale"] / np.sqrt(found[f"{conv}/variance"] + BN_EPS)
        folded[f"{conv}/kernel"] = found[f"{conv}/kernel"] * gain
        folded[f"{conv}/bias"] = found[f"{conv}/shift"] - found[f"{conv}/mean"] * gain
    return {path: folded[path].astype(np.float32) for path in spec}

"""ViTs and genes against torch: every format verified both ways, transformers' own classes, and timm where it is installed."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.checkpoint import weights
from common.checkpoint.convert import convert, open_donor
from common.checkpoint.weights import read_json
from common.nn.functional import functional
from learngene.verify import pictures
from learngene.vit import Vit, VitConfig
from learngene.zoo import FAMILY

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

SMALL = dict(size=16, patch=8, classes=5)
CASES = {
    "timm": VitConfig(**SMALL, width=32, heads=2, hidden=64, layers=2),
    "deit": VitConfig(**SMALL, width=192, heads=3, hidden=64, layers=2, tokens="cls+dist", pool="cls+dist"),
    "hf": VitConfig(**SMALL, width=32, heads=2, hidden=64, layers=2, tokens="cls", pool="cls", eps=1e-5),
    "hf, two heads": VitConfig(
        **SMALL, width=32, heads=2, hidden=64, layers=2, tokens="cls+dist", pool="cls+dist", activation="quick_gelu"
    ),
    "sws": VitConfig(**SMALL, width=96, heads=12, hidden=64, layers=5, eps=1e-5, gene="sws", layout=(3, 3, 4, 3, 3)),
    "tleg": VitConfig(**SMALL, width=192, heads=3, hidden=64, layers=2, eps=1e-5, gene="tleg", layout=(12,)),
    "google": VitConfig(**SMALL, width=32, heads=2, hidden=64, layers=2, tokens="cls", pool="cls", activation="gelu_tanh"),
}


def drawn(cfg, folder):
    """A weights folder of ours with numbers far from their initial values."""
    rng = np.random.default_rng(0)
    spec = functional(Vit, cfg).spec
    scale = {p: leaf.extent("read") ** -0.5 if p.endswith("kernel") else 0.2 for p, leaf in spec.items()}
    folder.mkdir()
    weights.write_params(folder, {p: (scale[p] * rng.standard_normal(leaf.shape)).astype(np.float32) for p, leaf in spec.items()})
    weights.write_config(folder, "learngene", cfg)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_and_the_same_function(case, tmp_path):
    format, ours = case.partition(",")[0], drawn(CASES[case], tmp_path / "ours")
    there = convert(open_donor(ours, [FAMILY]), tmp_path / "there", format)
    back = convert(open_donor(tmp_path / "there", [FAMILY]), tmp_path / "back", "heirloom")
    reference = "transformers" if format == "hf" else "ViT's formulas in torch"
    for check in (there, back):
        assert check.reference == reference and 0 < check.max_error < 5e-5 and check.cosine > 0.99999
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert read_json(tmp_path / "back" / "config.json") == read_json(ours / "config.json")


def test_a_training_checkpoint_is_read_by_its_model(tmp_path):
    """The releases save the model next to optimizer and average; the gene is the raw weights."""
    convert(open_donor(drawn(CASES["sws"], tmp_path / "ours"), [FAMILY]), tmp_path / "sws", "sws", verify=False)
    state = torch.load(tmp_path / "sws" / "sws.pth", weights_only=True)["model"]
    torch.save({"model": state, "model_ema": {k: v + 1 for k, v in state.items()}, "epoch": 3}, tmp_path / "checkpoint.pth")
    donor = open_donor(tmp_path / "checkpoint.pth", [FAMILY], layout="2,2,2,2,2")
    assert donor.format == "sws" and donor.cfg.layout == (2, 2, 2, 2, 2)
    np.testing.assert_array_equal(donor.source.values["norm/scale"], state["norm.weight"])


@pytest.mark.parametrize("pool", ["norm_mean", "mean_norm", "cls"])
def test_timm_reads_what_is_written(pool, tmp_path):
    timm = pytest.importorskip("timm")
    cfg = VitConfig(**SMALL, width=32, heads=4, hidden=64, layers=3, pool=pool, tokens="cls" if pool == "cls" else "none")
    donor = open_donor(drawn(cfg, tmp_path / "ours"), [FAMILY])
    convert(donor, tmp_path / "timm", "timm")
    about = json.loads(Path(tmp_path / "timm" / "config.json").read_text())
    model = timm.create_model(about["architecture"], num_classes=about["num_classes"], **about["model_args"]).eval()
    model.load_state_dict({k: torch.tensor(v) for k, v in weights.open_safetensors(tmp_path / "timm" / "model.safetensors").items()})
    x = pictures(cfg)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    ours = np.asarray(donor.model.apply({path: np.asarray(view) for path, view in donor.source.values.items()}, x))
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()

"""ViTs and genes against torch: every format verified both ways, by transformers and timm where they read it."""

from importlib.util import find_spec

import numpy as np
import pytest
from torchvision_stand_in import installed

from common.checkpoint.convert import convert, open_donor
from common.checkpoint.verify import OWN
from common.checkpoint.weights import read_json
from common.errors import Remark
from learngene.vit import VitConfig
from learngene.zoo import FAMILY

torch = pytest.importorskip("torch")
timm = None
if find_spec("timm"):
    with installed():
        import timm
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


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_and_the_same_function(case, drawn, tmp_path):
    format, ours = case.partition(",")[0], drawn(CASES[case], tmp_path / "ours")
    there = convert(open_donor(ours, [FAMILY]), tmp_path / "there", format)
    back = convert(open_donor(tmp_path / "there", [FAMILY]), tmp_path / "back", "heirloom")
    reference = {"hf": "transformers", "timm": timm and "timm"}.get(format) or OWN
    for check in (there, back):
        assert check.reference == reference and 0 < check.max_error < 5e-5 and check.cosine > 0.99999
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert read_json(tmp_path / "back" / "config.json") == read_json(ours / "config.json")


def test_a_training_checkpoint_is_read_by_its_model(drawn, tmp_path):
    """The releases save the model next to optimizer and average; the average is taken, and said."""
    convert(open_donor(drawn(CASES["sws"], tmp_path / "ours"), [FAMILY]), tmp_path / "sws", "sws", verify=False)
    state = torch.load(tmp_path / "sws" / "sws.pth", weights_only=True)["model"]
    torch.save({"model": state, "model_ema": {k: v + 1 for k, v in state.items()}, "epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.warns(Remark, match="the tensors under 'model_ema' taken"):
        donor = open_donor(tmp_path / "checkpoint.pth", [FAMILY], layout="2,2,2,2,2")
    assert donor.format == "sws" and donor.cfg.layout == (2, 2, 2, 2, 2)
    np.testing.assert_array_equal(donor.source.values["norm/scale"], state["norm.weight"] + 1)

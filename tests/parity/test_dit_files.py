"""facebookresearch/DiT's files at S/2: DiT's formulas in torch, the way back, training checkpoints."""

from argparse import Namespace
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import _as_read, convert, open_donor
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.verify import OWN
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from lit_jax.components import check_chain
from lit_jax.dit import Dit, DitConfig
from lit_jax.formats import SAMPLERS
from lit_jax.zoo import FAMILY, dit, lit

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

SMALL = DitConfig(size=16, channels=3, width=32, layers=2, heads=2, hidden=48, classes=7)
VARIANTS = {
    "dit": SMALL,
    "lit": replace(SMALL, attention="linear"),
    "per channel": replace(SMALL, attention="linear", filters="channel", window=3),
    "focused": replace(SMALL, attention="linear", features="focused"),
    "no filters": replace(SMALL, attention="linear", filters="none"),
}


def folder_of(cfg, path, seed=0):
    """A weights folder of ours with numbers far from zero."""
    rng = np.random.default_rng(seed)
    spec = functional(Dit, cfg).spec
    scale = {p: leaf.extent("read") ** -0.5 if p.endswith("kernel") else 0.2 for p, leaf in spec.items()}
    path.mkdir()
    weights.write_params(
        path, {p: (scale[p] * rng.standard_normal(leaf.shape)).astype(np.float32) for p, leaf in spec.items()}
    )
    weights.write_config(path, "lit", cfg)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_and_the_same_function(variant, tmp_path):
    ours = folder_of(VARIANTS[variant], tmp_path / "ours")
    there = convert(open_donor(ours, [FAMILY]), tmp_path / "fair", "fair")
    back = convert(open_donor(tmp_path / "fair", [FAMILY]), tmp_path / "back", "heirloom")
    for check in (there, back):
        assert check.reference == OWN and 0 < check.max_error < 5e-5 and check.cosine > 0.99999
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert read_json(tmp_path / "back" / "config.json") == read_json(ours / "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [dit("s"), lit("s")], ids=["DiT-S/2", "LiT-S/2"])
def test_full_size(cfg, tmp_path):
    ours = folder_of(cfg, tmp_path / "ours")
    check = convert(open_donor(ours, [FAMILY]), tmp_path / "fair", "fair")
    assert check.passed and 0 < check.max_error < 1e-4
    state = torch.load(tmp_path / "fair" / "dit.pt", weights_only=True)
    assert state["pos_embed"].shape == (1, 256, 384)
    assert sum(x.numel() for x in state.values()) - state["pos_embed"].numel() == sum(
        leaf.count for leaf in functional(Dit, cfg).spec.values()
    )


@pytest.fixture
def state(tmp_path):
    convert(open_donor(folder_of(SMALL, tmp_path / "ours"), [FAMILY]), tmp_path / "fair", "fair", verify=False)
    return torch.load(tmp_path / "fair" / "dit.pt", weights_only=True)


def test_of_a_training_checkpoint_the_average_is_taken(state, tmp_path):
    raw = {f"module.{key}": value + 1 for key, value in state.items()}
    torch.save(
        {"model": raw, "ema": state, "opt": {"step": 3}, "args": Namespace(model="DiT-S/2", lr=1e-4)},
        tmp_path / "0400000.pt",
    )
    donor = open_donor(tmp_path / "0400000.pt", [FAMILY], heads=2)
    assert donor.cfg == SMALL
    np.testing.assert_array_equal(
        donor.source.values["final/bias"], state["final_layer.linear.bias"].numpy().reshape(2, 2, 6)
    )


def test_a_refusal_that_was_overruled_is_so_for_the_reference_too(state, tmp_path):
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": wrapped, "args": Namespace(aux=Namespace(objective="hinge"))}, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"last.pt: trained with aux.objective hinge; .*, add --set prediction=noise"):
        open_donor(tmp_path / "last.pt", [FAMILY], heads=2)
    donor = open_donor(tmp_path / "last.pt", [FAMILY], heads=2, prediction="noise")
    with _as_read(donor) as file:
        assert weights.open_safetensors(file).keys() == state.keys()


def test_a_bare_file_of_unknown_width_asks_for_its_heads(state, tmp_path):
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(InputError, match=r"no published model of this kind is 32 wide; give --set heads=VALUE"):
        open_donor(tmp_path / "bare.pt", [FAMILY])


def test_another_position_table_is_refused(state, tmp_path):
    state["pos_embed"] = state["pos_embed"].flip(2)
    torch.save(state, tmp_path / "other.pt")
    write_json(tmp_path / "dit.json", {"heads": 2})
    with pytest.raises(InputError, match="its position table, of 64 places, is not DiT's"):
        open_donor(tmp_path / "other.pt", [FAMILY])


def test_diffusers_itself_is_the_reference_of_its_files(tmp_path):
    pytest.importorskip("diffusers")
    cfg = replace(SMALL, hidden=128)
    there = convert(open_donor(folder_of(cfg, tmp_path / "ours"), [FAMILY]), tmp_path / "out", "diffusers")
    back = convert(open_donor(tmp_path / "out", [FAMILY]), tmp_path / "back", "heirloom")
    for check in (there, back):
        assert check.passed and check.reference == "diffusers" and 0 < check.max_error < 5e-5
        assert "exponents over 127" in check.note and "its prediction differs by" in check.sentence()
    assert [guess.split(" is a guess")[0] for guess in back.guessed] == ["prediction = noise"]


def test_a_field_that_a_scheduler_leaves_out_has_the_default_of_its_class():
    diffusers = pytest.importorskip("diffusers")

    def accepted(config):
        try:
            check_chain(Fields(config, "scheduler_config.json"))
        except InputError:
            return False
        return True

    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and name.startswith(SAMPLERS)]
    seen = {}
    for name in names:
        passed = signature(getattr(diffusers, name).__init__).parameters
        defaults = {field: parameter.default for field, parameter in passed.items()}
        if "beta_schedule" in defaults:  # others have another chain, or need a package that is not installed
            seen[name] = accepted({"_class_name": name})
            assert seen[name] == accepted(defaults | {"_class_name": name}), name
    assert {name for name, fine in seen.items() if not fine} >= {"CogVideoXDDIMScheduler", "HeunDiscreteScheduler"}
    assert seen["DDIMScheduler"] and not accepted({"_class_name": "DDPMWuerstchenScheduler"})

"""`convert --to nnx` and `--to orbax`: what users of Flax restore without this package's reader, and the way back."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.methods import families
from heirloom.common.nn.functional import functional
from heirloom.common.typed import from_json
from heirloom.common.vit.model import Vit, VitConfig
from tinyclip_jax.model import Clip, ClipConfig

GOLDENS = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A CLIP of transformers in both forms."""
    folder = tmp_path_factory.mktemp("forms")
    donor = open_donor(GOLDENS / "clip" / "hf_gelu", families())
    checks = {to: convert(donor, folder / to, to) for to in ("nnx", "orbax")}
    return donor, folder, checks


def test_nnx_users_restore_the_state_of_the_module(written):
    """As the guide of Flax does: an abstract state, StandardCheckpointer, merge."""
    _, folder, checks = written
    cfg = from_json(ClipConfig, json.loads((folder / "nnx" / "config.json").read_text())["model"])
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Clip(cfg, rngs=nnx.Rngs(0))))
    second = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    place = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=second), abstract)
    checkpointer = ocp.StandardCheckpointer()
    placed = checkpointer.restore(folder / "nnx" / "state", place)
    assert all(leaf.sharding == second for leaf in jax.tree.leaves(placed))
    model = nnx.merge(graph, jax.device_put(checkpointer.restore(folder / "nnx" / "state", abstract)))
    expected = dict(np.load(GOLDENS / "clip" / "hf_gelu" / "expected.npz"))
    got = nnx.jit(model)(expected["images"].astype(np.float32) / 64, expected["tokens"])
    for name in ("image", "text"):
        assert np.abs(getattr(got, name) - expected[name]).max() < 1e-5 * np.abs(expected[name]).max()
    assert checks["nnx"].passed and not (folder / "nnx" / "model.safetensors").exists()


def test_orbax_users_restore_plain_dictionaries(written):
    donor, folder, _ = written
    tree = ocp.StandardCheckpointer().restore(folder / "orbax" / "state")
    np.testing.assert_array_equal(
        tree["image"]["blocks"]["attn"]["query"]["kernel"],
        np.asarray(donor.source.values["image/blocks/attn/query/kernel"]),
    )
    assert len(jax.tree.leaves(tree)) == len(donor.source.spec)


@pytest.mark.parametrize("to", ["nnx", "orbax"])
def test_the_way_back_keeps_every_bit(to, written, tmp_path):
    donor, folder, _ = written
    opened = open_donor(folder / to, families())
    assert (opened.format, opened.cfg) == (to, donor.cfg)
    convert(opened, tmp_path / "back", "hf", verify=False)
    folders = (GOLDENS / "clip" / "hf_gelu", tmp_path / "back")
    there, back = (weights.open_safetensors(where / "model.safetensors") for where in folders)
    assert there.keys() == back.keys()
    assert all(value.tobytes() == back[key].tobytes() for key, value in there.items())
    hashes = read_json(tmp_path / "back" / "verify.json")["source"]
    assert "state/_METADATA" in hashes and all(len(value) == 64 for value in hashes.values())
    with pytest.raises(InputError, match=f"the source is in the {to} format already"):
        convert(opened, tmp_path / "same", to)


def test_layers_of_different_sizes_are_padded_and_come_back(tmp_path):
    cfg = ClipConfig(
        image=replace(_clip().image, heads=(2, 1), head_dim=8, hidden=(5, 12)), text=_clip().text, joint=_clip().joint
    )
    model = functional(Clip, cfg)
    params = {p: np.asarray(v) for p, v in model.init(jax.random.key(0)).items()}
    (tmp_path / "ours").mkdir()
    weights.write_params(tmp_path / "ours", params, spec=model.spec)
    weights.write_config(tmp_path / "ours", "tinyclip", cfg)
    convert(open_donor(tmp_path / "ours", families()), tmp_path / "nnx", "nnx", verify=False)
    abstract = nnx.state(nnx.eval_shape(lambda: Clip(cfg, rngs=nnx.Rngs(0))))
    state = ocp.StandardCheckpointer().restore(tmp_path / "nnx" / "state", abstract)
    assert state["image"]["blocks"]["mlp"]["up"]["kernel"].shape == (2, 32, 12)
    back = open_donor(tmp_path / "nnx", families())
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(back.source.values[path]), value, err_msg=path)


def _clip():
    return open_donor(GOLDENS / "clip" / "open_clip_f16", families()).cfg


def test_a_state_that_was_trained_on_comes_back(tmp_path):
    """Someone trains with NNX and saves over `state/`: the folder is a SOURCE as before."""
    convert(open_donor(GOLDENS / "vit" / "hf_vit", families()), tmp_path / "vit", "nnx", verify=False)
    cfg = from_json(VitConfig, read_json(tmp_path / "vit" / "config.json")["model"])
    model = Vit(cfg, rngs=nnx.Rngs(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "vit" / "state", nnx.state(model), force=True)
    found = open_donor(tmp_path / "vit", families()).source.values
    np.testing.assert_array_equal(np.asarray(found["head/kernel"]), np.asarray(model.head.kernel[...]))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "state" / "_METADATA").write_text("{"), "not a readable checkpoint of orbax"),
        (lambda folder: (folder / "state").rename(folder / "other"), "state: there is no such folder"),
        (
            lambda folder: write_json(folder / "config.json", read_json(folder / "config.json") | {"stored": "zarr"}),
            "stored is 'zarr', known are nnx, orbax",
        ),
    ],
)
def test_damaged_folders_are_one_line(damage, complaint, tmp_path):
    convert(open_donor(GOLDENS / "vit" / "hf_vit", families()), tmp_path / "vit", "orbax", verify=False)
    damage(tmp_path / "vit")
    with pytest.raises(InputError, match=complaint) as error:
        open_donor(tmp_path / "vit", families())
    assert "\n" not in str(error.value)

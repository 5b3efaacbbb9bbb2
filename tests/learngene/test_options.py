"""The options of the ViT: read from names and shapes, written to timm's config and back, carried by expansion."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.plan import Source
from heirloom.common.vit.layouts import timm
from heirloom.common.vit.model import OPTIONS, Vit, VitConfig, macs
from heirloom.common.vit.shapes import check_square, shapes
from learngene import ligo, relatives
from learngene.bare_files import clean
from learngene.config import Config
from learngene.expand import expansion
from learngene.zoo import FAMILY

SIZES = dict(size=24, patch=4, width=16, layers=2, heads=2, hidden=32, classes=5)
PLAIN = VitConfig(**SIZES, tokens="cls", pool="cls")
CASES = {
    "registers": dict(registers=2),
    "patches alone have positions": dict(registers=2, positions="patches"),
    "pre_norm": dict(pre_norm=True),
    "final_norm": dict(final_norm=False),
    "qkv_bias": dict(qkv_bias=False),
    "qk_norm": dict(qk_norm=True),
    "inner_norms": dict(inner_norms=True),
    "layer_scale": dict(layer_scale=1e-5),
    "gated": dict(gated=True, activation="silu"),
    "map": dict(pool="map", tokens="none"),
    "no head": dict(classes=0),
    "all": dict(registers=1, pre_norm=True, qkv_bias=False, qk_norm=True, inner_norms=True, layer_scale=1e-5),
}


@pytest.mark.parametrize("case", CASES)
def test_an_option_is_read_from_names_and_shapes_and_from_timms_config(case, folder_of, tmp_path):
    cfg = replace(PLAIN, **CASES[case])
    spec = functional(Vit, cfg).spec
    tensors = {key: np.zeros(tensor.shape, np.float32) for key, tensor in timm(cfg).foreign(spec).items()}
    found = shapes(tensors, "blocks.0.{}.weight", 2)
    check_square(found, tensors)
    assert replace(found, heads=2) == cfg
    ours = folder_of(cfg)
    convert(open_donor(ours, [FAMILY]), tmp_path / "timm", "timm", verify=False)
    convert(open_donor(tmp_path / "timm", [FAMILY]), tmp_path / "back", "heirloom", verify=False)
    assert read_json(tmp_path / "back" / "config.json") == read_json(ours / "config.json")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()


def test_positions_tell_which_tokens_have_them():
    for registers, count, placed in ((4, 41, "all"), (4, 37, "cls"), (4, 36, "patches"), (0, 36, "patches")):
        cfg = replace(PLAIN, registers=registers, positions=placed)
        assert cfg.count == count
        tensors = {key: np.zeros(x.shape) for key, x in timm(cfg).foreign(functional(Vit, cfg).spec).items()}
        assert shapes(tensors, "blocks.0.{}.weight", 2).positions == placed
    both = replace(PLAIN, size=8, registers=4)  # 4 patches and 5 tokens, or 9 patches
    tensors = {key: np.zeros(x.shape) for key, x in timm(both).foreign(functional(Vit, both).spec).items()}
    with pytest.raises(InputError, match="has 9 positions, which are those of a square with 5 or 0 tokens in front"):
        check_square(shapes(tensors, "blocks.0.{}.weight", 2), tensors)


def test_names_of_the_original_repositories():
    assert [clean(key) for key in ("blocks.3.gamma_1", "register_tokens", "blocks.0.mlp.w12.weight")] == [
        "blocks.3.ls1.gamma",
        "reg_token",
        "blocks.0.mlp.fc1.weight",
    ]
    assert clean("blocks.2.11.norm1.weight") == "blocks.11.norm1.weight"  # in chunks
    assert clean("blocks.0.mlp.w3.bias") == "blocks.0.mlp.fc2.bias" and clean("norm.weight") == "norm.weight"


def test_the_defaults_are_deits_vit():
    assert PLAIN.options == {} and set(replace(PLAIN, **CASES["all"]).options) <= set(OPTIONS)
    assert replace(PLAIN, size_width=40).grid == (6, 10) and replace(PLAIN, size=27).grid == (6, 6)
    assert replace(PLAIN, registers=3, size_width=40).count == 64
    with pytest.raises(InputError, match="patches of 4 px do not fit pictures of 24 x 3 px: change size or patch"):
        _ = replace(PLAIN, size_width=3).grid


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(registers=-1), "registers is -1: choose a number from 0 to"),
        (dict(layer_scale=-1.0), "layer_scale is -1: choose 0 for none"),
        (dict(size_width=0), "size_width is 0: choose 1 or more"),
        (dict(pool="map", gated=True), "pool 'map' has a plain MLP, and gated is set"),
        (dict(pool="cls+dist", tokens="cls+dist", classes=0), "classes is 0, and pool 'cls.dist' averages"),
    ],
)
def test_options_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        replace(PLAIN, **fields)


@pytest.mark.parametrize("to", ["deit", "google"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(layer_scale=1e-5), "layer_scale is 1e-05, which .* does not hold; write --to timm"),
        (dict(size_width=40), "size_width is 40, which"),
        (dict(classes=0), "classes is 0, which"),
    ],
)
def test_formats_that_cannot_hold_an_option_name_it(to, fields, message, folder_of, tmp_path):
    donor = open_donor(folder_of(replace(PLAIN, **fields)), [FAMILY])
    with pytest.raises(InputError, match=message):
        convert(donor, tmp_path / "there", to, verify=False)
    assert not (tmp_path / "there").exists()


def test_expansion_carries_options_and_names_one_that_differs():
    gene = replace(PLAIN, **CASES["all"], gene="sws", layout=(2, 1))
    student = gene.of_depth(3)
    assert student.options == gene.options
    for classes in (5, 0, 7):  # inherited, without a head, and fresh
        spec = functional(Vit, replace(student, classes=classes)).spec
        donor = functional(Vit, replace(gene, classes=min(classes, 5))).spec
        plan = expansion(replace(gene, classes=min(classes, 5)), replace(student, classes=classes))
        resolved = plan.resolve(Source(donor, {path: np.zeros(leaf.shape) for path, leaf in donor.items()}), spec)
        assert {line.path for line in resolved.lines} == spec.keys() and (resolved.fraction == 1) == (classes != 7)
    for name, value in (("registers", 0), ("qk_norm", False), ("layer_scale", 0.0)):
        with pytest.raises(InputError, match=f"the student's {name} is {value}, the donor's"):
            expansion(gene, replace(student, **{name: value}))
    with pytest.raises(InputError, match="heads must be equal, or the norms inside the attention cannot be inherited"):
        expansion(gene, replace(student, heads=4))


def test_methods_with_maps_of_deits_vit_alone_name_the_option():
    donor = replace(PLAIN, registers=2)
    with pytest.raises(InputError, match="the donor's registers is 2, which weight selection cannot carry"):
        relatives.select(donor, PLAIN, "fresh")
    with pytest.raises(InputError, match="the student's pool is 'map', which LiGO cannot carry"):
        ligo.plan(PLAIN, replace(PLAIN, pool="map"), {})


def test_slopes_of_a_tleg_gene_start_at_zero_for_every_scale():
    cfg = replace(PLAIN, qk_norm=True, inner_norms=True, layer_scale=0.5, gene="tleg", layout=(4,))
    params = functional(Vit, cfg).init(jax.random.key(0))
    scales = {path: np.asarray(params[path]) for path in params if path.startswith("blocks") and "scale" in path}
    assert len(scales) == 8 and all((value[1] == 0).all() and (value[0] > 0).all() for value in scales.values())
    assert (scales["blocks/mlp_scale/scale"][0] == 0.5).all()


def test_pictures_of_another_size_are_refused_unless_the_config_allows_them(draw):
    wide = np.zeros((1, 24, 28, 3), np.float32)
    model = functional(Vit, PLAIN)
    params = draw(model.spec)
    with pytest.raises(InputError, match="pictures have 24 x 28 px, and the model reads 24 x 24 px: resize them, or"):
        model.apply(params, wide)
    assert functional(Vit, replace(PLAIN, any_size=True)).apply(params, wide).shape == (1, 5)
    rectangle = functional(Vit, replace(PLAIN, size_width=28))
    with pytest.raises(InputError, match="reads 24 x 28 px: only square models are evaluated and trained"):
        rectangle.apply(draw(rectangle.spec), wide[:, :, :24])


def test_training_refuses_what_it_cannot_train():
    for fields, message in (
        (dict(classes=0), "student.classes is 0, a model without a head"),
        (dict(size_width=40), "student.size_width is 40, and pictures are cut to squares"),
        (dict(size=27), "patches of 4 px do not fill pictures of 27 px"),
    ):
        with pytest.raises(InputError, match=message):
            Config(student=replace(PLAIN, **fields)).check(None)


def test_multiply_accumulates_of_the_parts():
    def cost(**fields):
        cfg = replace(PLAIN, **fields)
        return macs(cfg, functional(Vit, cfg).spec)

    # 37 tokens and 2 layers: a gate has 16 x 32 weights; attention pooling 36 keys and values, a query, and an MLP.
    assert cost(gated=True, activation="silu") - cost() == 2 * 37 * 16 * 32
    assert cost(pool="map") - cost() == 36 * 2 * 16**2 + 2 * 16**2 + 2 * 16 * 32 + 2 * 36 * 16
    assert cost(classes=0) - cost() == -16 * 5

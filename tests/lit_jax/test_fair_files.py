"""facebookresearch's files: what shapes and arguments tell, what is guessed and said, and what is refused by name."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.family import Found
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.nn.functional import functional
from heirloom.common.nn.position import sincos
from lit_jax import formats, layouts
from lit_jax.components import other_scale
from lit_jax.dit import Dit, DitConfig
from lit_jax.zoo import FAMILY

CFG = DitConfig(size=8, channels=4, patch=2, width=32, layers=2, heads=4, hidden=64, classes=5)
TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"


def tensors_of(cfg=CFG, seed=0):
    """Random tensors of such a file."""
    rng = np.random.default_rng(seed)
    layout = layouts.fair(cfg)
    shapes = layout.foreign(functional(Dit, cfg).spec)
    drawn = {key: (0.1 * rng.standard_normal(tensor.shape)).astype(np.float32) for key, tensor in shapes.items()}
    return drawn | {key: np.asarray(value) for key, value in layout.constant.items()}


def opened(tensors, tmp_path, **overrides):
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "dit.safetensors")
    return open_donor(tmp_path / "dit.safetensors", [FAMILY], **overrides)


def said(donor):
    return {guess.name: guess.value for guess in donor.guesses}


def read(tensors, tmp_path, **args):
    """The config of a file of a training script with these arguments."""
    return formats.FORMATS[0].read_config(Found(tensors, tmp_path, {"args": args}))


def test_what_is_guessed_is_said_and_can_be_set(tmp_path):
    donor = opened(tensors_of(), tmp_path, heads=4)
    assert donor.cfg == CFG
    assert said(donor) == {"classes": 5, "prediction": "noise"}
    why = "the table has 6 rows, and the last is taken for no class"
    assert f"{why} (convert with --set classes=VALUE if wrong)" in str(donor.guesses[0])
    assert opened(tensors_of(), tmp_path, heads=4, classes=5, prediction="noise").guesses == ()


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12)])
def test_heads_of_published_widths_are_a_guess(width, heads, tmp_path):
    cfg = replace(CFG, width=width, heads=heads, hidden=width, layers=1)
    tensors = tensors_of(cfg)
    donor = opened(tensors, tmp_path)
    assert donor.cfg == cfg and said(donor)["heads"] == heads
    other = opened(tensors, tmp_path, heads=2 * heads)
    assert other.cfg.heads == 2 * heads and "heads" not in said(other)


@pytest.mark.parametrize(("rows", "classes"), [(6, 5), (11, 10), (1001, 1000), (2, 1), (101, 100)])
def test_the_last_row_of_a_table_is_taken_for_no_class(rows, classes, tmp_path):
    donor = opened(tensors_of() | {TABLE: np.ones((rows, 32), np.float32)}, tmp_path, heads=4)
    assert (donor.cfg.classes, donor.cfg.null_class, donor.cfg.rows) == (classes, True, rows)
    assert said(donor)["classes"] == classes


@pytest.mark.parametrize("rows", [10, 100, 1000])
def test_a_table_that_may_have_no_such_row_asks(rows, tmp_path):
    tensors = tensors_of() | {TABLE: np.ones((rows, 32), np.float32)}
    words = rf"{rows} classes and none for no class, or {rows - 1} and one for it; give --set classes="
    with pytest.raises(InputError, match=words):
        opened(tensors, tmp_path, heads=4)
    for classes in (rows, rows - 1):
        assert (opened(tensors, tmp_path, heads=4, classes=classes).cfg.null_class) == (classes < rows)


def test_a_table_of_one_row_is_one_class(tmp_path):
    donor = opened(tensors_of() | {TABLE: np.ones((1, 32), np.float32)}, tmp_path, heads=4)
    assert (donor.cfg.classes, donor.cfg.null_class) == (1, False) and "classes" not in said(donor)


def test_the_number_of_classes_can_be_set(tmp_path):
    donor = opened(tensors_of(), tmp_path, heads=4, classes=6)
    assert (donor.cfg.classes, donor.cfg.null_class) == (6, False) and "classes" not in said(donor)
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    assert open_donor(tmp_path / "ours", [FAMILY]).cfg == donor.cfg
    with pytest.raises(InputError, match=r"has a row for no class, this model has none"):
        convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "out", "diffusers", verify=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(classes=4), "the table has 6 rows; choose 6 .no unconditional row. or 5 .last row unconditional."),
        (dict(heads=0), "heads=0: give a whole number, 1 or more"),
        (dict(heads="many"), "heads=many: give a whole number"),
        (dict(heads=5), "5 heads do not divide a width of 32"),
        (dict(heads=4, size=16), r"'pos_embed' has shape \(1, 16, 32\), this configuration needs \(1, 64, 32\)"),
        (dict(heads=4, prediction="velocity"), "prediction=velocity: only models that predict the noise"),
        (dict(heads=4, features="gelu"), "softmax attention has none"),
        (dict(head=4), "'head' cannot be set for this model; did you mean 'heads'"),
        (dict(), r"no published model of this kind is 32 wide; give --set heads=VALUE"),
    ],
)
def test_wrong_settings_are_one_line(overrides, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        opened(tensors_of(), tmp_path, **overrides)
    assert "\n" not in str(error.value)


def test_a_file_without_its_position_table_asks_for_the_size(tmp_path):
    tensors = tensors_of()
    del tensors[POSITIONS]
    with pytest.raises(InputError, match=r"the side of its inputs is not known.*--set size=VALUE"):
        opened(tensors, tmp_path, heads=4)
    assert opened(tensors, tmp_path, heads=4, size=8).cfg == CFG
    found = read(tensors, tmp_path, image_size=64, model="DiT-S/2")
    assert found.cfg.size == 8  # latents of an eighth
    assert any(guess.name == "size" and "pictures of 64 pixels" in guess.why for guess in found.guesses)
    pixels = tensors_of(replace(CFG, channels=3))
    del pixels[POSITIONS]
    guesses = read(pixels, tmp_path, image_size=64, model="DiT-S/2").guesses
    assert ("size", None) in [(guess.name, guess.value) for guess in guesses]


def test_the_scale_of_latents_is_read_and_kept(tmp_path):
    found = read(tensors_of(), tmp_path, num_heads=4, first_stage=dict(scale_factor=0.5, scale=8))
    assert found.known == {"scale": 0.5}
    donor = replace(opened(tensors_of(), tmp_path, heads=4), known=found.known)
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    for given in (donor, open_donor(tmp_path / "ours", [FAMILY])):
        assert other_scale(given, 0.5, "cache") == ""
        assert "with scaling_factor 0.18215, and" in (said := other_scale(given, 0.18215, "cache"))
        assert "was trained on latents with 0.5: name" in said


def test_another_autoencoder_in_the_arguments_is_named_and_kept(tmp_path):
    usual = read(tensors_of(), tmp_path, vae="ema")
    assert other_scale(replace(opened(tensors_of(), tmp_path, heads=4), known=usual.known), 0.18215, "cache") == ""
    known = read(tensors_of(), tmp_path, vae="stabilityai/sdxl-vae").known
    donor = replace(opened(tensors_of(), tmp_path, heads=4), known=known)
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    for given in (donor, open_donor(tmp_path / "ours", [FAMILY])):
        assert other_scale(given, 0.13025, "hf:stabilityai/sdxl-vae") == ""
        assert "name the autoencoder 'stabilityai/sdxl-vae': check" in other_scale(given, 0.18215, "sd-vae-ft-ema")


def test_another_model_in_the_file_is_named(tmp_path):
    vae = {f"vae.{name}.weight": np.zeros(1, np.float32) for name in "abc"}
    with pytest.raises(InputError, match=r"'vae.a.weight' is not part of .*; if 'vae' is another model, save the"):
        opened(tensors_of() | vae, tmp_path, heads=4)


@pytest.mark.parametrize(("rows", "cols", "words"), [(2, 8, "rectangles of 4 x 16"), (4, 8, "rectangles of 8 x 16")])
def test_rectangles_are_refused_by_name(rows, cols, words, tmp_path):
    """Sixteen places may be a square or not: the table tells."""
    with pytest.raises(InputError, match=words):
        opened(tensors_of() | {POSITIONS: sincos(rows, cols, 32).reshape(1, -1, 32)}, tmp_path, heads=4)


def test_another_position_table_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"of 15 places, is not DiT's fixed table"):
        opened(tensors_of() | {POSITIONS: np.zeros((1, 16, 31), np.float32)}, tmp_path, heads=4)
    with pytest.raises(InputError, match=r"of 16 places, is not DiT's fixed table"):
        opened(tensors_of() | {POSITIONS: np.zeros((1, 16, 32), np.float32)}, tmp_path, heads=4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_and_comes_back_bit_for_bit(dtype, tmp_path):
    """The fixed table is rounded in the file, and exact in the model."""
    tensors = {key: value.astype(dtype) for key, value in tensors_of(replace(CFG, size=64)).items()}
    donor = opened(tensors, tmp_path, heads=4)
    assert donor.cfg.size == 64
    spoilt = tensors[POSITIONS].astype(np.float32)
    spoilt[0, 7, 3] += 0.02
    with pytest.raises(InputError, match=r"is not DiT's fixed table"):
        opened(tensors | {POSITIONS: spoilt.astype(dtype)}, tmp_path, heads=4)
    written = layouts.fair(donor.cfg).foreign(opened(tensors, tmp_path, heads=4).source.spec)
    assert {tensor.dtype for tensor in written.values()} == {np.dtype(dtype)}
    np.testing.assert_array_equal(layouts.fair(donor.cfg).constant[POSITIONS].astype(dtype), tensors[POSITIONS])


def test_what_arguments_tell_is_no_guess(tmp_path):
    tensors = tensors_of(replace(CFG, width=384, heads=6, hidden=384, layers=1, classes=1000))
    found = read(tensors, tmp_path, model="DiT-S/2", num_classes=1000, image_size=64)
    assert found.guesses == () and (found.cfg.heads, found.cfg.classes, found.cfg.null_class) == (6, 1000, True)
    found = read(tensors, tmp_path, model="DiT-S/2", num_classes=1001)
    assert (found.cfg.classes, found.cfg.null_class) == (1001, False)
    with pytest.raises(InputError, match=r"its arguments say 10 classes, and the table of classes has 1001 rows"):
        read(tensors, tmp_path, model="DiT-S/2", num_classes=10)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("projectors.0.0.weight", "a SiT trained with REPA, which predicts velocity"),
        ("blocks.1.moe.experts.3.gate_proj.weight", "a DiT-MoE"),
        ("temp_embed", "a Latte, which draws videos"),
        ("blocks.0.mlp.w12.weight", "a LightningDiT"),
        ("attention_y_norm.weight", "a Sana: of the models that draw from text only PixArt-Sigma and its LiT are read"),
        ("en_inblocks.0.attn.qkv.weight", "a masked diffusion transformer"),
    ],
)
def test_relatives_are_refused_by_name(extra, words, tmp_path):
    with pytest.raises(InputError, match=words):
        opened(tensors_of() | {extra: np.zeros(1, np.float32)}, tmp_path, heads=4)


def test_a_model_without_variance_and_oblong_patches_are_refused(tmp_path):
    tensors = tensors_of()
    last = {key: tensors[key][:16] for key in ("final_layer.linear.weight", "final_layer.linear.bias")}
    with pytest.raises(InputError, match=r"predicts no variance \(learn_sigma=False\)"):
        opened(tensors | last, tmp_path, heads=4)
    with pytest.raises(InputError, match=r"its last layer writes 24 numbers a patch: with 4 channels it should be 32"):
        opened(tensors | {key: tensors[key][:24] for key in last}, tmp_path, heads=4)
    with pytest.raises(InputError, match=r"its patches are 2 x 4"):
        opened(tensors | {"x_embedder.proj.weight": np.zeros((32, 4, 2, 4), np.float32)}, tmp_path, heads=4)


def test_the_kernel_of_linear_attention_is_a_guess(tmp_path):
    lit = replace(CFG, attention="linear", heads=2)
    donor = opened(tensors_of(lit), tmp_path)
    assert donor.cfg == lit and said(donor) == {"classes": 5, "features": "relu", "prediction": "noise"}
    assert opened(tensors_of(lit), tmp_path, features="gelu").cfg.features == "gelu"
    with pytest.raises(
        InputError, match=r"features=gelus: kernel of linear attention; choose relu, gelu, focused, focused_gelu"
    ):
        opened(tensors_of(lit), tmp_path, features="gelus")


def test_our_own_file_next_to_the_weights_leaves_nothing_to_guess(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    cfg = replace(CFG, attention="linear", features="gelu", filters="none", classes=6, null_class=False)
    formats.FORMATS[0].write_config(cfg, folder)
    assert read_json(folder / "dit.json") == {"heads": 4, "classes": 6, "prediction": "noise", "features": "gelu"}
    donor = opened(tensors_of(cfg), folder)
    assert donor.cfg == cfg and donor.guesses == ()
    (folder / "dit.json").write_text('{"heads": "4"}')
    with pytest.raises(InputError, match=r"dit.json: heads is '4', and must be a whole number"):
        opened(tensors_of(cfg), folder)


def test_a_model_without_a_row_for_none_computes(tmp_path, draw):
    cfg = replace(CFG, null_class=False)
    model = functional(Dit, cfg)
    assert model.spec["label/table"].shape == (5, 32)
    weights.write_params(tmp_path, draw(model.spec))
    weights.write_config(tmp_path, "lit", cfg)
    donor = open_donor(tmp_path, [FAMILY])
    assert donor.cfg == cfg and FAMILY.verify(cfg, donor.source.values, donor.file, "heirloom").passed
    assert open_safetensors(donor.file)["label/table"].shape == (5, 32)

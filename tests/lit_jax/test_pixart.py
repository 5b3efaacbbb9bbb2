"""PixArt-Sigma and its LiT: published size, positions, text, inheritance."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.nn.functional import functional
from heirloom.common.nn.position import sincos
from heirloom.common.surgery.plan import Source
from lit_jax.inherit import graft_attention
from lit_jax.pixart import PixArt, PixArtConfig, macs, parameters
from lit_jax.text_recipe import Config
from lit_jax.zoo import FAMILIES, PIXART, pixart_sigma, text_lit

CFG = PixArtConfig(
    size=8, width=32, layers=2, heads=4, cross_heads=4, hidden=128, text_width=16, text_tokens=300, interpolation=2.0
)
LIT = replace(CFG, attention="linear", heads=2)
# Fields of `LIT` that are not those of the published size.
_SIZES = ("size", "width", "layers", "heads", "cross_heads", "hidden", "text_width")


def drawn(spec, seed=0):
    rng = np.random.default_rng(seed)
    scale = {p: leaf.extent("read") ** -0.5 if p.endswith("kernel") else 0.3 for p, leaf in spec.items()}
    return {p: (scale[p] * rng.standard_normal(leaf.shape)).astype(np.float32) for p, leaf in spec.items()}


def folder_of(cfg, path, seed=0):
    path.mkdir()
    weights.write_params(path, drawn(functional(PixArt, cfg).spec, seed))
    weights.write_config(path, "pixart", cfg)
    return path


def batch_of(rows=8, cols=12, tokens=6, lengths=(2, 6), width=16, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, rows, cols, 4)).astype(np.float32)
    text = rng.standard_normal((2, tokens, width)).astype(np.float32)
    return x, np.array([3.25, 900.0], np.float32), text, np.arange(tokens) < np.array(lengths)[:, None]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A diffusers folder."""
    root = tmp_path_factory.mktemp("theirs")
    donor = open_donor(folder_of(CFG, root / "ours"), FAMILIES)
    convert(donor, root / "diffusers", "diffusers", verify=False)
    return root / "diffusers"


def test_parameters_are_the_published_number():
    spec = functional(PixArt, pixart_sigma()).spec
    assert parameters(spec) == {"total": 610_856_096}
    stored = functional(PixArt, replace(pixart_sigma(), null_text=True)).spec
    assert parameters(stored) == {"total": 610_856_096} and stored["null_text"].shape == (300, 4096)
    lit = functional(PixArt, text_lit()).spec
    assert parameters(lit) == {"total": 610_856_096 + 28 * (25 + 1) * 288}


def test_macs_of_the_blocks():
    # 12 N D^2 dense, 2 N D^2 of cross-attention's query and output, 2 N^2 D of softmax, 2 N T D of cross-attention's.
    n, d, tokens, layers = 1024, 1152, 300, 28
    blocks = layers * (14 * n * d**2 + 2 * n**2 * d + 2 * n * tokens * d)
    text = tokens * (4096 * d + d**2 + layers * 2 * d**2)
    rest = n * (16 * d + 32 * d) + (256 * d + d**2 + 6 * d**2)
    cfg = pixart_sigma()
    assert macs(cfg, functional(PixArt, cfg).spec) == blocks + text + rest


def test_a_new_model_predicts_zero_and_ignores_its_text():
    model = functional(PixArt, CFG)
    params = model.init(jax.random.key(0))
    assert not np.asarray(model.apply(params, *batch_of())).any()
    assert not np.asarray(params["blocks/cross/out/kernel"]).any()
    for path in ("table", "final_table"):
        assert abs(np.asarray(params[path]).std() * 32**0.5 - 1) < 0.2
    assert abs(np.asarray(params["modulation/kernel"]).std() - 0.02) < 0.002


@pytest.mark.parametrize("cfg", [CFG, LIT], ids=["softmax", "linear"])
def test_a_sampler_can_compute_time_and_text_once(cfg):
    model = functional(PixArt, cfg)
    params, (x, t, text, mask) = drawn(model.spec), batch_of()
    whole = model.apply(params, x, t, text, mask)
    condition = model.apply(params, text, mask, method="condition")
    assert condition.key.shape == condition.value.shape == (2, 2, 6, 4, 8) and condition.mask.dtype == bool
    modulation = model.apply(params, t, method="modulations")
    assert modulation.blocks.shape == (2, 6, 2, 32) and modulation.final.shape == (2, 2, 32)
    np.testing.assert_array_equal(whole, model.apply(params, x, modulation, condition, method="denoise"))
    assert whole.shape == (2, 8, 12, 8) and whole.dtype == np.float32


@pytest.mark.parametrize("cfg", [CFG, LIT], ids=["softmax", "linear"])
def test_rows_and_columns_are_not_mixed_up(cfg):
    """A picture on its side is another picture: positions and the depthwise filters know which side is which."""
    model = functional(PixArt, cfg)
    params, (x, t, text, mask) = drawn(model.spec), batch_of()
    one = np.asarray(model.apply(params, x, t, text, mask))
    other = np.asarray(model.apply(params, x.swapaxes(1, 2), t, text, mask)).swapaxes(1, 2)
    assert one.shape == other.shape and np.abs(one - other).max() > 0.1


def test_positions_span_the_same_at_every_size():
    assert [pixart_sigma(pixels).span for pixels in (256, 512, 1024, 2048)] == [32] * 4
    table = sincos(4, 8, 16, span=16)
    np.testing.assert_allclose(table[1, 3, [0, 4, 8, 12]], [np.sin(6), np.cos(6), np.sin(4), np.cos(4)], rtol=1e-6)


def test_masked_tokens_have_a_weight_of_exactly_zero():
    model = functional(PixArt, CFG)
    params, (x, t, text, mask) = drawn(model.spec), batch_of()
    one = model.apply(params, x, t, text, mask)
    far = np.where(mask[:, :, None], text, 1e20).astype(np.float32)
    np.testing.assert_array_equal(one, model.apply(params, x, t, far, mask))
    np.testing.assert_array_equal(one, model.apply(params, x, t, text, mask.astype(np.int32)))
    np.testing.assert_allclose(one[0], model.apply(params, x, t, text[:, :2], mask[:, :2])[0], atol=1e-5)


def test_times_are_not_rounded():
    """In bfloat16 897 and 900 are one number: features are computed of the time as it was given."""
    model = functional(PixArt, CFG)
    params = {path: value.astype(jax.numpy.bfloat16) for path, value in drawn(model.spec).items()}
    one, other = (model.apply(params, np.array([t], np.float32), method="modulations") for t in (897.0, 900.0))
    assert np.abs(np.asarray(one.blocks - other.blocks, np.float32)).max() > 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(mask=np.array([[True] * 6, [False] * 6])), "text 1 of the batch has no token in its mask"),
        (dict(mask=np.zeros((2, 6), np.float32)), r"the text mask is float32 \[2, 6\], and must be bool \[2, 6\]"),
        (dict(mask=np.ones((2, 5), bool)), r"the text mask is bool \[2, 5\], and must be bool \[2, 6\]"),
        (dict(text=np.ones((2, 6, 8), np.float32)), r"text features are \[2, 6, 8\], and must be \[batch, token, 16\]"),
        (dict(x=np.ones((2, 8, 7, 4), np.float32)), "a side of the latents is 7: give a multiple of 2"),
    ],
)
def test_wrong_inputs_are_refused(change, words):
    model = functional(PixArt, CFG)
    given = dict(zip(("x", "t", "text", "mask"), batch_of(), strict=True)) | change
    with pytest.raises(InputError, match=words):
        model.apply(drawn(model.spec), **given)


def test_a_text_without_a_token_is_finite_under_jit():
    model = functional(PixArt, CFG)
    x, t, text, mask = batch_of()
    mask = mask & np.array([[True], [False]])
    assert np.isfinite(jax.jit(model.apply)(drawn(model.spec), x, t, text, mask)).all()


@pytest.mark.parametrize("keep", ["o", "none", "qkvo"])
def test_exactly_these_leaves_are_fresh(keep):
    donor, student = functional(PixArt, CFG), functional(PixArt, LIT)
    plan = graft_attention(CFG, LIT, keep)
    resolution = plan.resolve(Source(donor.spec, drawn(donor.spec)), student.spec)
    kept = {"o": {"out"}, "none": set(), "qkvo": {"query", "key", "value", "out"}}[keep]
    left = {
        f"blocks/attn/{name}/{leaf}" for name in {"query", "key", "value", "out"} - kept for leaf in ("kernel", "bias")
    }
    fresh = left | {"blocks/attn/depthwise/kernel", "blocks/attn/depthwise/bias"}
    assert {line.path for line in resolution.lines if line.source is None} == fresh
    assert set(resolution.unused) == left


def test_the_recipe_inherits_from_a_folder_of_diffusers(theirs, tmp_path):
    recipe = Config(student=LIT, donor=str(theirs))
    record = recipe.inherit(tmp_path / "student")
    student = open_donor(tmp_path / "student", FAMILIES)
    assert student.family is PIXART and student.cfg == LIT
    donor = open_donor(theirs, FAMILIES)
    got = {path: np.asarray(view) for path, view in student.source.values.items()}
    had = {path: np.asarray(view) for path, view in donor.source.values.items()}
    new = functional(PixArt, LIT).init(jax.random.key(0))
    for path, value in got.items():
        own = path.startswith("blocks/attn/") and "/out/" not in path
        np.testing.assert_array_equal(value.ravel(), np.ravel(new[path] if own else had[path]), err_msg=path)
    assert record["parameters"]["blocks/attn/out/kernel"]["fraction"] == 1
    assert read_json(tmp_path / "student" / "provenance.json")["source"] == str(theirs)
    with pytest.raises(InputError, match="no donor: give --donor SOURCE"):
        replace(recipe, donor="").inherit(tmp_path / "other")


def test_a_lit_of_another_resolution_hands_all_of_it_down(tmp_path):
    folder_of(LIT, tmp_path / "small")
    larger = replace(LIT, size=16, interpolation=4.0)
    recipe = Config(student=larger, donor=str(tmp_path / "small"), keep="all")
    assert recipe.inherit(tmp_path / "large")["fraction"] == 1


@pytest.mark.parametrize("field", ["channels", "patch", "width", "layers", "hidden", "text_width", "cross_heads"])
def test_another_shape_is_refused_by_name(field):
    with pytest.raises(InputError, match=f"student's {field} is"):
        graft_attention(CFG, replace(LIT, **{field: 2 * getattr(LIT, field)}))


def test_a_dit_is_no_donor_of_a_text_model(cfg):
    with pytest.raises(InputError, match="the student is text-conditional, the donor class-conditional"):
        graft_attention(cfg, LIT)


def test_the_command_takes_the_donor_as_a_flag(theirs, tmp_path, capsys):
    out = ["--json", str(tmp_path / "record.json")]
    flags = [f"--student.{name.replace('_', '-')}={getattr(LIT, name)}" for name in _SIZES]
    flags += ["--student.interpolation", "2"]  # as the donor, whose positions the student reads
    assert main(["inherit", "lit/t2i_512", str(tmp_path / "student"), "--donor", str(theirs), *flags, *out]) == 0
    assert "of the parameters come from" in capsys.readouterr().out
    assert read_json(tmp_path / "record.json")["source"] == str(theirs)
    assert main(["inherit", "lit/t2i_512", str(tmp_path / "student"), "--donr", "x"]) == 2
    with pytest.raises(SystemExit):
        main(["inherit", "lit/t2i_512", "--help"])
    assert capsys.readouterr().out.startswith("usage: heirloom inherit lit/t2i_512 ")
    run = ["--run", str(tmp_path / "run"), "--donor", str(theirs), "--teacher", "", *flags]
    assert main(["train", "lit/t2i_512", *run]) == 2
    assert "give --autoencoder SOURCE: the data is encoded with it" in capsys.readouterr().err


def test_gradients_reach_every_trained_leaf():
    model = functional(PixArt, replace(LIT, remat="full"))
    params, batch = drawn(model.spec), batch_of()
    gradients = jax.jit(jax.grad(lambda params: (model.apply(params, *batch) ** 2).mean()))(params)
    # A bias of all keys shifts every score alike: softmax does not see it, and its gradient is 0 but for rounding.
    zero = {path for path, value in gradients.items() if np.abs(value).max() < 1e-7}
    assert zero == {"memory/key/bias"}


def test_commands_for_classes_refuse_a_text_model_by_name(tmp_path, capsys):
    folder = folder_of(CFG, tmp_path / "ours")
    words = {"sample": "give --prompt", "eval": f"{folder} draws from text, and this command draws classes"}
    for verb, says in words.items():
        assert main([verb, str(folder)]) == 2
        said = capsys.readouterr().err.strip()
        assert says in said and len(said.splitlines()) == 1

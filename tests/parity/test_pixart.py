"""PixArt-Σ against diffusers, its files in all formats, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from heirloom.common.checkpoint.convert import convert  # noqa: E402
from heirloom.common.errors import InputError, Remark  # noqa: E402
from heirloom.common.methods import open_any  # noqa: E402
from lit_jax.pixart import PixArtConfig  # noqa: E402
from lit_jax.pixart_verify import inputs, predictions, read_by_diffusers  # noqa: E402

SMALL = dict(
    num_attention_heads=4, attention_head_dim=24, num_layers=3, cross_attention_dim=96, sample_size=16,
    caption_channels=40, use_additional_conditions=False, interpolation_scale=2,
)  # fmt: skip


def write(folder, **changes):
    """A folder of diffusers with random weights everywhere."""
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(**SMALL | changes)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn(value.shape) * (0.5 if "table" in name else 0.15))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pixart") / "transformer")


@pytest.mark.parametrize(
    "changes", [{}, dict(sample_size=8, interpolation_scale=0.5), dict(sample_size=128, interpolation_scale=None)]
)
def test_predictions_are_those_of_diffusers(tmp_path, changes):
    """Square, wide and tall latents, two lengths of text, a fractional time."""
    donor = open_any(str(write(tmp_path / "t", **changes)))
    assert donor.cfg.interpolation == (changes.get("interpolation_scale", 2) or 2)
    params = {path: np.asarray(view) for path, view in donor.source.values.items()}
    model = read_by_diffusers(donor.file)
    for rows, cols in ((16, 16), (6, 20), (22, 4)):
        given = inputs(donor.cfg, rows, cols)
        (theirs,) = predictions(model, [given])
        ours = np.asarray(donor.model.apply(params, *given))
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


def test_masked_tokens_change_nothing(folder):
    donor = open_any(str(folder))
    params = {path: np.asarray(view) for path, view in donor.source.values.items()}
    x, t, text, mask = inputs(donor.cfg, 8, 8)
    other = np.where(mask[..., None], text, 100.0).astype(np.float32)
    np.testing.assert_array_equal(
        donor.model.apply(params, x, t, text, mask), donor.model.apply(params, x, t, other, mask)
    )


def same(one, other):
    one, other = open_any(str(one)), open_any(str(other))
    assert one.source.values.keys() == other.source.values.keys() and one.cfg == other.cfg
    for path, value in one.source.values.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other.source.values[path]))


def test_formats_are_converted_both_ways_to_the_bit(folder, tmp_path):
    check = convert(open_any(str(folder)), tmp_path / "ours", "heirloom")
    assert check.passed and check.reference == "diffusers" and check.max_error < 1e-4
    with pytest.warns(Remark, match="without y_embedder.y_embedding"):
        check = convert(open_any(str(tmp_path / "ours")), tmp_path / "pth", "pixart")
    assert check.passed and check.reference == "own formulas"
    convert(open_any(str(tmp_path / "pth")), tmp_path / "again", "heirloom")
    same(tmp_path / "ours", tmp_path / "again")
    convert(open_any(str(tmp_path / "again")), tmp_path / "diffusers", "diffusers")
    same(folder, tmp_path / "diffusers")
    a, b = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "diffusers"))
    assert {k: v for k, v in a.items() if not k.startswith("_d")} == b


def published(tensors, **more):
    """A file as PixArt's training writes it."""
    return {"state_dict": tensors, "epoch": 1, **more}


@pytest.fixture(scope="module")
def tensors(folder, tmp_path_factory):
    """A model under PixArt's own names, with the features of an empty text."""
    out = tmp_path_factory.mktemp("pth") / "pth"
    with pytest.warns(Remark):
        convert(open_any(str(folder)), out, "pixart", verify=False)
    found = torch.load(out / "pixart.pth")["state_dict"]
    return found | {"y_embedder.y_embedding": torch.randn(300, 40)}


def test_a_published_file_keeps_the_empty_text_and_needs_its_size(tensors, tmp_path):
    bare = {key: value for key, value in tensors.items() if key != "pos_embed"}
    torch.save(published(bare, state_dict_ema={k: v * 0.5 for k, v in bare.items()}), tmp_path / "m.pth")
    with pytest.raises(InputError, match="--set size=VALUE"):
        open_any(str(tmp_path / "m.pth"))
    with pytest.warns(Remark, match="state_dict_ema|interpolation"):
        donor = open_any(str(tmp_path / "m.pth"), size=128, heads=4)
    assert (donor.cfg.size, donor.cfg.interpolation, donor.cfg.null_text) == (128, 2.0, True)
    table = np.asarray(donor.source.values["null_text"])
    np.testing.assert_array_equal(table, bare["y_embedder.y_embedding"].numpy() * 0.5)
    assert donor.family.parameters(donor.model.spec)["total"] == sum(
        v.numel() for k, v in bare.items() if "y_embedding" not in k
    )
    torch.save(published(tensors), tmp_path / "t.pth")
    assert open_any(str(tmp_path / "t.pth"), heads=4).cfg.interpolation == 2.0  # its table of positions says so


def lit(tensors):
    """The text-to-image LiT of LiT's release."""
    out, rng = dict(tensors), np.random.default_rng(1)
    for i in range(3):
        for name in ("weight", "bias"):
            fused = out.pop(f"blocks.{i}.attn.qkv.{name}")
            out[f"blocks.{i}.attn.q.{name}"], out[f"blocks.{i}.attn.kv.{name}"] = fused[:96], fused[96:]
        out[f"blocks.{i}.attn.dwc.weight"] = torch.from_numpy(rng.standard_normal((48, 1, 5, 5)).astype(np.float32))
        out[f"blocks.{i}.attn.dwc.bias"] = torch.from_numpy(rng.standard_normal(48).astype(np.float32))
    return out


def test_the_release_of_lit_is_read_and_written(tensors, tmp_path):
    torch.save(published(lit(tensors)), tmp_path / "lit.pth")
    donor = open_any(str(tmp_path / "lit.pth"))
    assert (donor.cfg.attention, donor.cfg.heads, donor.cfg.filters, donor.cfg.cross_heads) == (
        "linear",
        2,
        "shared",
        16,
    )
    donor = open_any(str(tmp_path / "lit.pth"), cross_heads=4)
    check = convert(donor, tmp_path / "ours", "heirloom")
    assert check.passed and check.reference == "own formulas" and check.max_error < 1e-4
    convert(open_any(str(tmp_path / "ours")), tmp_path / "back", "pixart")
    same(tmp_path / "ours", tmp_path / "back")
    written = torch.load(tmp_path / "back" / "pixart.pth")["state_dict"]
    assert all(torch.equal(written[key], value) for key, value in lit(tensors).items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"csize_embedder.mlp.0.weight": torch.zeros(1)}, "PixArt-α"),
        ({"blocks.1.attn.sr.weight": torch.zeros(96, 1, 2, 2)}, "compressed keys and values"),
        ({"y_embedder.y_embedding": torch.zeros(120, 40)}, "120 tokens, so it is a PixArt-α"),
        ({"pos_embed": torch.ones(1, 64, 96)}, "position table"),
    ],
)
def test_other_checkpoints_are_refused_by_name(tensors, tmp_path, change, says):
    torch.save(published(tensors | change), tmp_path / "m.pth")
    with pytest.raises(InputError, match=says) as error:
        open_any(str(tmp_path / "m.pth"), heads=4, size=16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_type", "ada_norm_zero"),
        ("use_additional_conditions", True),
        ("activation_fn", "geglu"),
        ("cross_attention_dim", 64),
        ("caption_channels", 41),
        ("interpolation_scale", 0),
        ("out_channels", 4),
        ("attention_bias", False),
        ("attention_type", "gated"),
        ("qk_norm", "rms_norm"),
    ],
)
def test_a_config_that_changes_the_function_is_refused(folder, tmp_path, name, value):
    (tmp_path / "t").mkdir()
    for file in folder.iterdir():
        (tmp_path / "t" / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {name: value}
    (tmp_path / "t" / "config.json").unlink()
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=name) as error:
        open_any(str(tmp_path / "t"))
    assert "\n" not in str(error.value)


def test_diffusers_cannot_hold_a_lit(tensors, tmp_path):
    torch.save(published(lit(tensors)), tmp_path / "lit.pth")
    with pytest.raises(InputError, match="no linear attention"):
        convert(open_any(str(tmp_path / "lit.pth"), cross_heads=4), tmp_path / "d", "diffusers")


def test_configs_that_cannot_be_are_refused():
    for change in (dict(heads=5), dict(cross_heads=7), dict(size=5), dict(interpolation=0.0)):
        with pytest.raises(InputError):
            replace(PixArtConfig(), **change)

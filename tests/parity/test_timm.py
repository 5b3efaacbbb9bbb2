"""timm itself as the reference: it reads its own config and file, and loads what we write."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from torchvision_stand_in import installed

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.verify import OWN
from heirloom.common.errors import InputError, VerificationError
from heirloom.common.files import read_json
from heirloom.common.vit import timm_architectures
from heirloom.common.vit.model import VitConfig
from learngene.labels import labels_of
from learngene.verify import pictures
from learngene.zoo import FAMILY

torch = pytest.importorskip("torch")
if not find_spec("timm"):
    pytest.skip("timm is not installed", allow_module_level=True)
with installed():
    import timm
    from timm.models import save_for_hf
pytestmark = pytest.mark.parity

TINY = "vit_tiny_patch16_224"
SIZES = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
OURS = dict(size=16, patch=8, width=32, heads=4, hidden=64, layers=2, classes=5)


@pytest.fixture
def write(tmp_path):
    """`write(name, labels, **args)`: a folder that timm saved a random model in, and its logits of `pictures`."""

    def write(name=TINY, labels=None, **args):
        torch.manual_seed(0)
        model = timm.create_model(name, **SIZES | args).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_for_hf(
            model,
            tmp_path / "theirs",
            model_config={"label_names": labels} if labels else None,
            safe_serialization=True,
        )
        return tmp_path / "theirs"

    return write


def logits(model, cfg):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(pictures(cfg)).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        (TINY, {}),
        (TINY, dict(act_layer="quick_gelu", global_pool="avg")),
        (TINY, dict(global_pool="avg", fc_norm=False, class_token=False, mlp_ratio=3.0)),
        ("vit_base_patch32_siglip_gap_256", {}),  # tanh GELU and the mean of normalised tokens, by its name alone
        ("vit_base_patch16_gap_224", dict(num_heads=16)),
        ("vit_base_patch16_clip_224", dict(pre_norm=False, dynamic_img_size=True)),  # an eps of 1e-5, by its name alone
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_timm_reads_its_own_config_and_agrees(name, args, write, tmp_path):
    check = convert(open_donor(write(name, **args), [FAMILY]), tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference, check.guessed) == (True, "timm", ())
    assert check.max_error < 2e-5 and "timm" in check.versions


def test_an_architecture_may_have_the_tag_of_its_weights(write, tmp_path):
    file = write() / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architecture": f"{TINY}.augreg_in21k"}))
    assert convert(open_donor(file.parent, [FAMILY]), tmp_path / "ours", "heirloom").reference == "timm"


def test_a_setting_that_our_reader_overlooks_fails_the_verification(write, tmp_path, monkeypatch):
    monkeypatch.setattr(timm_architectures, "ACTIVATIONS", dict.fromkeys(timm_architectures.ACTIVATIONS, "gelu"))
    donor = open_donor(write(act_layer="quick_gelu"), [FAMILY])
    with pytest.raises(VerificationError, match="was not written: features differ from those of timm by"):
        convert(donor, tmp_path / "ours", "heirloom")
    assert not (tmp_path / "ours").exists()


def test_without_its_config_only_our_own_formulas_can_serve(write, tmp_path):
    (write() / "config.json").unlink()
    check = convert(open_donor(tmp_path / "theirs", [FAMILY], heads=4), tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference) == (True, OWN)
    assert [text.split()[0] for text in check.guessed] == ["activation", "eps", "size", "pool"]


@pytest.mark.parametrize(
    "fields",
    [
        dict(pool="norm_mean"),
        dict(pool="mean_norm", hidden=85),
        dict(pool="cls", tokens="cls", activation="gelu_tanh"),
        dict(pool="norm_mean", tokens="cls", activation="quick_gelu", eps=1e-5),
        dict(pool="cls+dist", tokens="cls+dist"),
    ],
)
def test_timms_own_loader_reads_what_is_written(fields, drawn, tmp_path):
    cfg = VitConfig(**OURS | fields)
    donor = open_donor(drawn(cfg, tmp_path / "ours"), [FAMILY])
    check = convert(donor, tmp_path / "timm", "timm")
    assert (check.passed, check.reference) == (True, "timm")
    assert open_donor(tmp_path / "timm", [FAMILY]).cfg == cfg
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    ours = np.asarray(
        donor.model.apply({path: np.asarray(view) for path, view in donor.source.values.items()}, pictures(cfg))
    )
    np.testing.assert_allclose(logits(model, cfg), ours, rtol=1e-4, atol=1e-4)


def test_an_eps_that_timm_cannot_tell_is_set_by_a_flag(drawn, tmp_path):
    ours = drawn(VitConfig(**OURS, eps=1e-12), tmp_path / "ours")
    with pytest.raises(InputError, match="1e-6 or 1e-5, this model has 1e-12: convert with --set eps=1e-6"):
        convert(open_donor(ours, [FAMILY]), tmp_path / "timm", "timm")
    check = convert(open_donor(ours, [FAMILY], eps="1e-6"), tmp_path / "timm", "timm")
    assert (check.passed, check.reference) == (True, "timm")


def test_a_written_deit_file_loads_as_the_release_does(drawn, tmp_path):
    """timm's loader opens the wrapper that DeiT's own trainer looks under."""
    cfg = VitConfig(**OURS | dict(width=192, heads=3), tokens="cls", pool="cls")
    convert(open_donor(drawn(cfg, tmp_path / "ours"), [FAMILY]), tmp_path / "deit", "deit")
    file = tmp_path / "deit" / "deit.pth"
    assert torch.load(file, weights_only=True).keys() == {"model"}
    sizes = dict(img_size=16, patch_size=8, depth=2, mlp_ratio=64 / 192, num_classes=5)
    model = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(file), **sizes)
    donor = open_donor(file, [FAMILY])
    ours = np.asarray(
        donor.model.apply({path: np.asarray(view) for path, view in donor.source.values.items()}, pictures(cfg))
    )
    np.testing.assert_allclose(logits(model, cfg), ours, rtol=1e-4, atol=1e-4)


def test_label_names_go_there_and_back(write, tmp_path):
    names = ["zebra", "apple", "moon", "crane", "crane"]
    convert(open_donor(write(labels=names), [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
    assert json.loads((tmp_path / "ours" / "labels.json").read_text()) == names
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "timm")
    assert read_json(tmp_path / "back" / "config.json")["label_names"] == names
    assert labels_of(open_donor(tmp_path / "back", [FAMILY])) == tuple(names)
    assert timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).pretrained_cfg["label_names"] == names


def test_the_table_is_that_of_the_installed_timm():
    """What the functions of these names pass on has not changed since the table was written."""
    from make_timm_table import architecture, preprocessing

    others = (
        "vit_base_patch16_gap_224",
        "vit_base_patch32_siglip_gap_256",
        "deit_small_distilled_patch16_224",
        "deit3_base_patch16_224",
    )
    for name in (TINY, *others):
        assert architecture(name) == timm_architectures.table()[name]
        for tagged, fields in preprocessing(name).items():
            assert dict(fields, mean=list(fields["mean"]), std=list(fields["std"])) == (
                timm_architectures.preprocessing(tagged)
            )


def test_a_written_archive_loads_in_timms_reader_of_googles(drawn, tmp_path):
    cfg = VitConfig(**OURS, tokens="cls", pool="cls", activation="gelu_tanh")
    donor = open_donor(drawn(cfg, tmp_path / "ours"), [FAMILY])
    convert(donor, tmp_path / "npz", "google")
    model = timm.create_model(TINY, **SIZES, mlp_ratio=2, act_layer="gelu_tanh")
    model.load_pretrained(str(tmp_path / "npz" / "vit.npz"))
    ours = np.asarray(
        donor.model.apply({path: np.asarray(view) for path, view in donor.source.values.items()}, pictures(cfg))
    )
    np.testing.assert_allclose(logits(model, cfg), ours, rtol=1e-4, atol=1e-4)

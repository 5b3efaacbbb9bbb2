"""ViTs and genes against torch: every format verified both ways, by transformers and timm where they read it."""

from importlib.util import find_spec

import numpy as np
import pytest
from torchvision_stand_in import installed

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.verify import OWN
from heirloom.common.errors import InputError, Remark
from heirloom.common.files import read_json, write_json
from heirloom.common.vit.model import VitConfig
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
    "google": VitConfig(
        **SMALL, width=32, heads=2, hidden=64, layers=2, tokens="cls", pool="cls", activation="gelu_tanh"
    ),
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
    torch.save(
        {"model": state, "model_ema": {k: v + 1 for k, v in state.items()}, "epoch": 3}, tmp_path / "checkpoint.pth"
    )
    with pytest.warns(Remark, match="the tensors under 'model_ema' taken"):
        donor = open_donor(tmp_path / "checkpoint.pth", [FAMILY], layout="2,2,2,2,2")
    assert donor.format == "sws" and donor.cfg.layout == (2, 2, 2, 2, 2)
    np.testing.assert_array_equal(donor.source.values["norm/scale"], state["norm.weight"] + 1)


@pytest.mark.parametrize(
    "kind", ["ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"]
)
def test_transformers_reads_its_own_config_and_what_we_write(kind, seeded, tmp_path, capsys):
    import transformers

    names = {0: "zebra", 1: "apple", 2: "moon"}
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    config = (transformers.ViTConfig if kind.startswith("ViT") else transformers.DeiTConfig)(
        **sizes,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-3,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    torch.manual_seed(0)
    model = seeded(getattr(transformers, kind)(config), 0)
    model.save_pretrained(tmp_path / "theirs")
    capsys.readouterr()
    check = convert(open_donor(tmp_path / "theirs", [FAMILY]), tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference, check.guessed) == (True, "transformers", ()) and check.max_error < 2e-5
    assert capsys.readouterr().err == ""  # no progress bars between the lines of a command
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "hf")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "back").eval()
    assert type(loaded) is type(model) and loaded.config.id2label == names
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        np.testing.assert_array_equal(loaded(x).logits.numpy(), model(x).logits.numpy())


def test_the_named_file_is_the_one_that_is_verified(seeded, tmp_path):
    """Two variants in one folder: each is compared with itself."""
    import transformers
    from safetensors.torch import load_file, save_file

    sizes = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    seeded(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=3)), 0).save_pretrained(
        tmp_path / "hf"
    )
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    other = {key: value * 1.5 for key, value in tensors.items()}
    save_file(other, tmp_path / "hf" / "model.other.safetensors", metadata={"format": "pt"})
    for name in ("model.safetensors", "model.other.safetensors"):
        check = convert(open_donor(tmp_path / "hf" / name, [FAMILY]), tmp_path / name.replace(".", "_"), "heirloom")
        assert (check.passed, check.reference) == (True, "transformers")


def test_other_models_of_transformers_are_refused_by_name(tmp_path):
    import transformers

    sizes = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    dino = {name: size for name, size in sizes.items() if name != "intermediate_size"}
    for kind, config, message in (
        ("ViTMSNForImageClassification", transformers.ViTMSNConfig(**sizes), "model_type is 'vit_msn'"),
        ("Dinov2Backbone", transformers.Dinov2Config(**dino), r"architectures is \['Dinov2Backbone'\]"),
        ("BeitForImageClassification", transformers.BeitConfig(**sizes), "model_type is 'beit', a BEiT"),
        (
            "IJepaForImageClassification",
            transformers.IJepaConfig(**sizes),
            "model_type is 'ijepa', an I-JEPA, which has no class token",
        ),
        ("IJepaModel", transformers.IJepaConfig(**sizes), "model_type is 'ijepa', an I-JEPA"),
        ("YolosModel", transformers.YolosConfig(**sizes | dict(image_size=[16, 16])), "model_type is 'yolos', a YOLOS"),
        ("ViTForMaskedImageModeling", transformers.ViTConfig(**sizes), "architectures is .*ViTForMaskedImageModeling"),
    ):
        getattr(transformers, kind)(config).save_pretrained(tmp_path / kind)
        with pytest.raises(InputError, match=message):
            open_donor(tmp_path / kind, [FAMILY])


def test_a_config_that_does_not_say_how_many_classes_there_are(drawn, tmp_path):
    """transformers takes 2 where a config has neither id2label nor num_labels; the weights have 5."""
    convert(open_donor(drawn(CASES["hf"], tmp_path / "ours"), [FAMILY]), tmp_path / "hf", "hf", verify=False)
    config = read_json(tmp_path / "hf" / "config.json")
    write_json(
        tmp_path / "hf" / "config.json",
        {key: value for key, value in config.items() if key not in ("id2label", "label2id")},
    )
    assert convert(open_donor(tmp_path / "hf", [FAMILY]), tmp_path / "back", "heirloom").reference == "transformers"

"""open_clip itself as the reference: it reads its own config and file, and loads what we write."""

import json
from dataclasses import replace
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from torchvision_stand_in import installed

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.verify import OWN
from heirloom.common.checkpoint.weights import write_config, write_params
from heirloom.common.errors import InputError, VerificationError
from heirloom.common.nn.functional import functional
from tinyclip_jax import open_clip_folder
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.verify import inputs
from tinyclip_jax.zoo import FAMILY

torch = pytest.importorskip("torch")
load_file, save_file = (getattr(pytest.importorskip("safetensors.torch"), name) for name in ("load_file", "save_file"))
if not find_spec("open_clip"):
    pytest.skip("open_clip is not installed", allow_module_level=True)
with installed():
    from open_clip.model import CLIP

VISION = dict(image_size=16, layers=2, width=128, patch_size=8)
RESNET = dict(image_size=64, layers=[1, 1, 1, 1], width=16, head_width=32)
TEXT = dict(context_length=10, vocab_size=60, width=32, heads=2, layers=2)


@pytest.fixture
def write(tmp_path):
    """`write(vision, text, **model)`: a folder that a random open_clip model was saved in, with its own config."""

    def write(vision=VISION, text=TEXT, **model):
        config = (
            dict(embed_dim=12, vision_cfg=VISION | vision if vision is not RESNET else RESNET, text_cfg=TEXT | text)
            | model
        )
        torch.manual_seed(0)
        clip = CLIP(**json.loads(json.dumps(config))).eval()
        with torch.no_grad():
            for parameter in clip.parameters():
                if parameter.ndim:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        folder = tmp_path / "theirs"
        folder.mkdir()
        save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        return folder

    return write


@pytest.mark.parametrize(
    ("vision", "text", "model"),
    [
        ({}, {}, {}),
        ({}, {}, dict(quick_gelu=True)),
        ({}, dict(pool_type="eos", eos_id=7), {}),
        (dict(act_kwargs={"approximate": "tanh"}, norm_kwargs={"eps": 1e-3}), dict(norm_kwargs={"eps": 1e-6}), {}),
        (dict(head_width=32, mlp_ratio=3.0), dict(heads=4), {}),
        (RESNET, {}, dict(quick_gelu=True)),
    ],
)
def test_open_clip_reads_its_own_config_and_agrees(vision, text, model, write, tmp_path):
    check = convert(open_donor(write(vision, text, **model), [FAMILY]), tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference, check.guessed) == (True, "open_clip", ())
    assert check.max_error < 1e-5 and "open_clip_torch" in check.versions


def test_a_setting_that_our_reader_overlooks_fails_the_verification(write, tmp_path, monkeypatch):
    """The reference does not share our reading: were `pool_type` overlooked, it still pools at the named token."""

    read = open_clip_folder._text

    def overlooks(c, text, activation):
        others = {name: text.value(name) for name in text if name not in ("pool_type", "eos_id")}
        text.skip("*")
        return read(c, Fields(others, text.where), activation)

    monkeypatch.setattr(open_clip_folder, "_text", overlooks)
    donor = open_donor(write(text=dict(pool_type="eos", eos_id=7)), [FAMILY])
    with pytest.raises(VerificationError, match="was not written: features differ from those of open_clip by"):
        convert(donor, tmp_path / "ours", "heirloom")
    assert not (tmp_path / "ours").exists()


def test_without_its_config_only_our_own_formulas_can_serve_and_the_guesses_are_listed(write, tmp_path):
    folder = write()
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(InputError, match="set the number of heads"):
        open_donor(folder, [FAMILY])
    check = convert(open_donor(folder, [FAMILY], text_heads=2), tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference) == (True, OWN) and check.sentence().startswith(
        "checked against our own formulas"
    )
    saved = json.loads((tmp_path / "ours" / "verify.json").read_text())
    assert saved["reference"] == "own formulas"
    assert [text.split()[0] for text in saved["guessed"]] == ["activation", "image_heads", "text_pool"]


@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
def test_what_we_write_loads_in_open_clip_and_computes_the_same(vision, write, tmp_path):
    folder = write(vision, quick_gelu=True)
    convert(open_donor(folder, [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
    check = convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "open_clip")
    assert (check.passed, check.reference) == (True, "open_clip")
    config = json.loads((tmp_path / "back" / "open_clip_config.json").read_text())["model_cfg"]
    clip, before = (
        CLIP(**config).eval(),
        CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]).eval(),
    )
    # counters of batch norms
    clip.load_state_dict(load_file(tmp_path / "back" / "open_clip_model.safetensors"), strict=vision is VISION)
    before.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    pictures, tokens = inputs(open_donor(folder, [FAMILY]).cfg)
    with torch.no_grad():
        x, ids = torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
        for a, b in ((clip.encode_image(x), before.encode_image(x)), (clip.encode_text(ids), before.encode_text(ids))):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_the_reference_gets_the_named_file_whatever_its_name(tmp_path):
    """Two variants in one folder: each is compared with itself."""
    from transformers import CLIPConfig, CLIPModel

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        text_config=sizes | dict(vocab_size=60, max_position_embeddings=10, eos_token_id=59),
        vision_config=sizes | dict(image_size=16, patch_size=8),
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    other = {key: (value + 0.1 if value.ndim else value).half() for key, value in tensors.items()}
    save_file(other, tmp_path / "hf" / "model.fp16.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="name the file you mean"):
        open_donor(tmp_path / "hf", [FAMILY])
    for name in ("model.safetensors", "model.fp16.safetensors"):
        check = convert(open_donor(tmp_path / "hf" / name, [FAMILY]), tmp_path / name.replace(".", "_"), "heirloom")
        assert (check.passed, check.reference) == (True, "transformers") and check.max_error < 1e-5


def test_a_reference_that_refuses_the_file_is_an_error_of_verification(tmp_path):
    def refuses(*_):
        raise RuntimeError("size mismatch\nfor logit_scale")

    cfg = ClipConfig(ImageConfig(16, 8, 32, 1, 2, 32), TextConfig(6, 20, 16, 1, 2, 16), joint=8)
    (tmp_path / "ours").mkdir()
    write_config(tmp_path / "ours", "tinyclip", cfg)
    write_params(tmp_path / "ours", functional(Clip, cfg).init(jax.random.key(0)))
    donor = open_donor(tmp_path / "ours", [replace(FAMILY, verify=refuses)])
    said = r"could not be run on these weights \(RuntimeError: size mismatch for logit_scale\)"
    with pytest.raises(VerificationError, match=said) as error:
        convert(donor, tmp_path / "hf", "hf")
    assert "--no-verify" in str(error.value) and not (tmp_path / "hf").exists()

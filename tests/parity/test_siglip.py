"""SigLIP and MetaCLIP 2 of transformers, and CLIPs of open_clip around timm's ViT: read, verified, written back."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.errors import InputError
from heirloom.common.methods import families
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.vit.timm_architectures import table
from tinyclip_jax.inherit import manual
from tinyclip_jax.losses import affinity_mimicking
from tinyclip_jax.model import Clip
from tinyclip_jax.vit import VitImageConfig
from tinyclip_jax.zoo import FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::heirloom.common.errors.Remark")]

BLOCKS = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TEXT = BLOCKS | dict(hidden_size=24, vocab_size=60, max_position_embeddings=10)
IMAGE = BLOCKS | dict(hidden_size=32, image_size=32, patch_size=8)


@pytest.fixture
def siglip(seeded, tmp_path):
    """A folder that transformers saved a random SigLIP in, whose towers have two widths, and the model."""
    torch.manual_seed(0)
    text = TEXT | dict(projection_size=32, hidden_act="gelu")
    model = seeded(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=IMAGE)), 0)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-7.0)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


def same(a, b):
    a, b = (open_safetensors(file) for file in (a, b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(b[key]), err_msg=key)


def test_siglip_is_read_as_transformers_computes_it_and_written_back(siglip, tmp_path):
    folder, _ = siglip
    donor = open_donor(folder, families())
    assert donor.family is FAMILY  # and not its image tower alone, as a ViT
    assert isinstance(donor.cfg.image, VitImageConfig) and donor.cfg.logit_bias
    assert (donor.cfg.text.activation, donor.cfg.image.activation) == ("gelu", "gelu_tanh")
    check = convert(donor, tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference, check.guessed) == (True, "transformers", ())
    assert check.max_error < 1e-5
    ours = open_donor(tmp_path / "ours", [FAMILY])
    assert ours.cfg == donor.cfg
    convert(ours, tmp_path / "back", "hf", verify=False)
    same(folder / "model.safetensors", tmp_path / "back" / "model.safetensors")
    again, info = transformers.SiglipModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and again.config.text_config.projection_size == 32
    with pytest.raises(InputError, match="the image tower is timm's ViT, which the original layout does not have"):
        convert(ours, tmp_path / "original", "original", verify=False)


def test_a_siglip_teacher_has_the_affinities_of_its_logits_bias_included(siglip):
    """Affinity mimicking takes features and scale: the bias of transformers' logits is in the softmax and cancels."""
    folder, model = siglip
    donor = open_donor(folder, [FAMILY])
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(0, 60, (4, 10))
    params = {path: np.asarray(view) for path, view in donor.source.values.items()}
    teacher = donor.model.apply(params, images, tokens)
    np.testing.assert_allclose([teacher.scale, teacher.bias], [np.exp(2), -7], rtol=1e-6)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        theirs = model(pixel_values=pixels, input_ids=torch.from_numpy(tokens)).logits_per_image
    logits = teacher.scale * teacher.image @ teacher.text.T + teacher.bias
    np.testing.assert_allclose(logits, theirs.numpy(), atol=1e-4)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 4, 6), np.float32))
    student = torch.from_numpy(5 * image @ text.T)
    rows = torch.nn.functional.cross_entropy(student, theirs.softmax(1))
    columns = torch.nn.functional.cross_entropy(student.T, theirs.T.softmax(1))
    ours = affinity_mimicking(image, text, teacher.image, teacher.text, 5.0, teacher.scale)
    np.testing.assert_allclose(ours, (rows + columns) / 2, rtol=1e-5)


def test_a_student_of_siglip_keeps_its_bias_and_half_of_its_layers(siglip):
    donor = open_donor(siglip[0], [FAMILY])
    image, text = replace(donor.cfg.image, layers=1, hidden=32), replace(donor.cfg.text, layers=1, hidden=16)
    cfg = replace(donor.cfg, image=image, text=text)
    student = functional(Clip, cfg)
    init = partial(student.init, jax.random.key(0))
    params = graft(manual(donor.cfg, cfg), donor.source, student.spec, None, init)
    assert float(params["logit_bias"]) == -7 and float(params["logit_scale"]) == pytest.approx(np.log(1 / 0.07))
    kept = np.asarray(donor.source.values["image/blocks/mlp/up/kernel"])[:1, :, :32]
    np.testing.assert_array_equal(params["image/blocks/mlp/up/kernel"], kept)
    np.testing.assert_array_equal(params["image/pool/latent"], np.asarray(donor.source.values["image/pool/latent"]))


def test_metaclip_2_pools_at_the_end_token_that_its_config_names(seeded, tmp_path):
    """Unlike CLIP's, an id of 2 is meant."""
    torch.manual_seed(0)
    config = transformers.MetaClip2Config(
        text_config=TEXT | dict(eos_token_id=2), vision_config=IMAGE, projection_dim=12
    )
    seeded(transformers.MetaClip2Model(config), 0).save_pretrained(tmp_path / "theirs")
    donor = open_donor(tmp_path / "theirs", [FAMILY])
    assert donor.cfg.text.eot == 2
    check = convert(donor, tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference) == (True, "transformers") and check.max_error < 1e-5
    ours = open_donor(tmp_path / "ours", [FAMILY])
    check = convert(ours, tmp_path / "back", "hf")  # as MetaClip2Model: CLIPModel would pool at the largest id
    assert (check.passed, check.reference) == (True, "transformers") and check.max_error < 1e-5
    assert open_donor(tmp_path / "back", [FAMILY]).cfg == ours.cfg
    with pytest.raises(InputError, match="the end token is 2, where transformers' Flax CLIP pools at the largest id"):
        convert(ours, tmp_path / "flax", "flax", verify=False)


def test_pictures_of_any_size_are_refused_by_name(tmp_path):
    config = transformers.Siglip2Config(
        text_config=TEXT | dict(projection_size=32), vision_config=BLOCKS | dict(hidden_size=32, patch_size=8)
    )
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model_type is 'siglip2' \(.*NaFlex\); only models where it is 'siglip'"):
        open_donor(tmp_path, [FAMILY])


@pytest.mark.skipif(not find_spec("open_clip"), reason="open_clip is not installed")
@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32-SigLIP2-256",  # attention pooling, no projection of pictures, one with a bias of texts
        "ViT-SO400M-16-SigLIP-i18n-256",  # no projection of texts
        "MobileCLIP2-L-14",  # timm's class token and head, in a CustomTextCLIP
        "vit_medium_patch16_gap_256",  # the mean, in a CLIP
        "ViT-L-14-CLIPA",  # open_clip's own ViT: the mean of the patches, no norm before the blocks
        "ViT-M-16-alt",  # and LayerScale
    ],
)
def test_open_clip_reads_its_own_config_and_what_we_write(name, tmp_path):
    import count_open_clips as script

    architecture = script.json.loads(script.CONFIGS[name].read_text())["vision_cfg"].get("timm_model_name")
    (tmp_path / "theirs").mkdir()
    with patch.dict(table()[architecture] if architecture else {}), script.small_timm(architecture):
        model = script.save(name, tmp_path / "theirs")
        check = convert(open_donor(tmp_path / "theirs", [FAMILY]), tmp_path / "ours", "heirloom")
        assert (check.passed, check.reference, check.guessed) == (True, "open_clip", ())
        assert check.max_error < 1e-5
        ours = open_donor(tmp_path / "ours", [FAMILY])
        check = convert(ours, tmp_path / "back", "open_clip")
        assert (check.passed, check.reference) == (True, "open_clip")
        assert open_donor(tmp_path / "back", [FAMILY]).cfg == ours.cfg
    theirs = {key.removeprefix("text."): value.numpy() for key, value in model.state_dict().items()}
    back = open_safetensors(tmp_path / "back" / "open_clip_model.safetensors")
    assert theirs.keys() == back.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)

"""ViT-B/32 at full size through both libraries: features, the way back, and the tokenizer beside the weights."""

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.data.text import Tokenizer
from heirloom.common.files import read_json
from tinyclip_jax.verify import inputs
from tinyclip_jax.zoo import FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

CAPTIONS = ["a photo of a cat", "Two dogs, running!", "", "naïve café 123"]


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def theirs(request, seeded, tmp_path_factory):
    """A folder as the hub has it: a random ViT-B/32 and CLIP's tokenizer; the GELU one in half precision and shards."""
    act, folder = {"hidden_act": request.param}, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    model = seeded(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=act | {"eos_token_id": 2}, vision_config=act)), 1
    )
    if request.param == "gelu":
        model.half().save_pretrained(folder, max_shard_size="100MB")
        model.float()
    else:
        model.save_pretrained(folder)
    Tokenizer.clip().save(folder)
    return model, folder


@pytest.fixture(scope="module")
def converted(theirs, tmp_path_factory):
    _, folder = theirs
    ours, back = (tmp_path_factory.mktemp("converted") / name for name in ("ours", "back"))
    checks = [convert(open_donor(folder, [FAMILY]), ours, "heirloom"), convert(open_donor(ours, [FAMILY]), back, "hf")]
    return checks, ours, back


def torch_features(model, images, tokens):
    with torch.no_grad():
        out = model(
            pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2), input_ids=torch.from_numpy(tokens).long()
        )
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def test_features_agree_with_transformers(theirs, converted):
    model, _ = theirs
    _, ours, _ = converted
    donor = open_donor(ours, [FAMILY])
    images, tokens = inputs(donor.cfg)
    params = {path: np.asarray(view, np.float32) for path, view in donor.source.values.items()}
    got = jax.jit(donor.model.apply)(params, images, tokens)
    for mine, reference in zip(got, torch_features(model, images, tokens), strict=False):
        assert np.abs(mine - reference).max() / np.abs(reference).max() < 1e-4
        assert (np.asarray(mine) * reference).sum(-1).min() > 0.9999
    np.testing.assert_allclose(got.scale, model.logit_scale.exp().item(), rtol=1e-6)


def test_the_converters_own_check_says_the_same(converted):
    checks, ours, back = converted
    for check, folder in zip(checks, (ours, back), strict=True):
        assert check.passed and check.reference == "transformers"
        assert 0 < check.max_error < 1e-4 and check.cosine > 0.9999
        saved = read_json(folder / "verify.json")
        assert saved["passed"] is True and saved["max_error"] == check.max_error
    assert len(read_json(ours / "verify.json")["source"]) >= 1


def test_the_way_back_keeps_every_bit_and_transformers_loads_it(theirs, converted):
    model, folder = theirs
    _, _, back = converted
    original = {key: value for file in folder.glob("*.safetensors") for key, value in open_safetensors(file).items()}
    returned = open_safetensors(back / "model.safetensors")
    assert returned.keys() == original.keys() and len(original) == 398
    for key, value in original.items():
        assert value.dtype == returned[key].dtype
        assert value.tobytes() == returned[key].tobytes(), key
    images, tokens = inputs(open_donor(folder, [FAMILY]).cfg)
    reloaded = transformers.CLIPModel.from_pretrained(back, dtype=torch.float32).eval()
    for a, b in zip(torch_features(reloaded, images, tokens), torch_features(model, images, tokens), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_tokenizer_travels_along(converted):
    _, ours, back = converted
    here, there = Tokenizer.load(ours), transformers.CLIPTokenizerFast.from_pretrained(back)
    ids = there(CAPTIONS, padding="max_length", max_length=77, truncation=True)
    for row, mask, theirs in zip(here(CAPTIONS, 77), ids["attention_mask"], ids["input_ids"], strict=True):
        length = sum(mask)
        assert row[:length].tolist() == theirs[:length]
        assert theirs[length - 1] == 49407

"""Each option of timm's VisionTransformer: read and verified by timm, written back, and loaded by timm again."""

from importlib.util import find_spec

import numpy as np
import pytest
from torchvision_stand_in import installed

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from learngene.verify import pictures
from learngene.zoo import FAMILY

torch = pytest.importorskip("torch")
if not find_spec("timm"):
    pytest.skip("timm is not installed", allow_module_level=True)
with installed():
    import timm
    from timm.models import save_for_hf
pytestmark = pytest.mark.parity

TINY, GATED, CLIP = "vit_tiny_patch16_224", "vit_giant_patch14_dinov2", "vit_base_patch16_clip_224"
SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
CASES = {
    "registers": (TINY, dict(reg_tokens=2)),
    "registers without positions": (TINY, dict(reg_tokens=4, no_embed_class=True)),
    "class token without a position": (TINY, dict(no_embed_class=True)),
    "no class token": (TINY, dict(class_token=False, reg_tokens=1, global_pool="avg")),
    "LayerScale": (TINY, dict(init_values=0.1)),
    "no biases of queries, keys and values": (TINY, dict(qkv_bias=False)),
    "norms of queries and keys": (TINY, dict(qk_norm=True)),
    "a norm before the blocks": (CLIP, {}),
    "no norm after the blocks": (TINY, dict(final_norm=False)),
    "norms inside": (TINY, dict(scale_attn_norm=True, scale_mlp_norm=True)),
    "SwiGLU": (GATED, {}),
    "attention pooling": (TINY, dict(class_token=False, global_pool="map", act_layer="gelu_tanh")),
    "attention pooling of patches alone": (TINY, dict(reg_tokens=2, global_pool="map", mlp_ratio=3.0)),
    "patches of 14 that do not fill the picture": (TINY, dict(img_size=33, patch_size=14)),
    "a rectangle": (TINY, dict(img_size=(16, 40), reg_tokens=1)),
    "no head": (TINY, dict(num_classes=0, init_values=1e-5)),
    "other sizes": (TINY, dict(dynamic_img_size=True, reg_tokens=1, no_embed_class=True)),
}


def save(folder, name, **args):
    """A folder that timm saved a random model in, and the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SIZES | args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_for_hf(model, folder, safe_serialization=True)
    return model


def logits(model, x):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize("case", CASES)
def test_an_option_is_read_as_timm_computes_it_and_written_back(case, tmp_path):
    name, args = CASES[case]
    model = save(tmp_path / "theirs", name, **args)
    donor = open_donor(tmp_path / "theirs", [FAMILY])
    check = convert(donor, tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference, check.guessed) == (True, "timm", ())
    assert check.max_error < 1e-4
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "timm", verify=False)
    assert open_donor(tmp_path / "back", [FAMILY]).cfg == donor.cfg
    theirs, back = (open_safetensors(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert theirs.keys() == back.keys()
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
    x = pictures(donor.cfg)
    np.testing.assert_array_equal(logits(again, x), logits(model, x))


def test_a_model_of_other_sizes_resamples_its_positions_as_timm_does(tmp_path):
    model = save(tmp_path / "theirs", *CASES["other sizes"][:1], **CASES["other sizes"][1])
    donor = open_donor(tmp_path / "theirs", [FAMILY])
    params = {path: np.asarray(view) for path, view in donor.source.values.items()}
    for size in ((16, 40), (64, 24)):
        x = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
        theirs = logits(model, x)
        assert np.abs(np.asarray(donor.model.apply(params, x)) - theirs).max() < 1e-4 * np.abs(theirs).max()

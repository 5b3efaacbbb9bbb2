"""AutoencoderKL through both libraries, small and full size: moments, pictures, the way back, older names."""

from functools import partial

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.unwrap import write_torch
from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.surgery.layout import Tensor
from lit_jax.autoencoder import macs, parameters
from lit_jax.autoencoder_layouts import FAMILY

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

FILE = "diffusion_pytorch_model.safetensors"
SMALL = dict(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.13025)
FULL = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)


def autoencoder(seeded, **sizes):
    levels = len(sizes["block_out_channels"])
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    torch.manual_seed(0)
    return seeded(diffusers.AutoencoderKL(sample_size=64, **blocks, **sizes), 0)


@pytest.fixture(scope="module")
def small(seeded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder") / "small"
    model = autoencoder(seeded, **SMALL)
    model.save_pretrained(folder)
    return model, folder


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def agree(model, donor, height, width):
    """Largest errors relative to the reference's largest value, of mean, logvar and decoded picture."""
    images = np.random.default_rng(0).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
    params = {path: np.asarray(view, np.float32) for path, view in donor.source.values.items()}
    moments = jax.jit(partial(donor.model.apply, method="encode"))(params, images)
    decoded = jax.jit(partial(donor.model.apply, method="decode"))(params, moments.mean)
    with torch.no_grad():
        posterior = model.encode(nchw(images)).latent_dist
        theirs = [
            x.permute(0, 2, 3, 1).numpy()
            for x in (posterior.mean, posterior.logvar, model.decode(nchw(moments.mean)).sample)
        ]
    for mine, reference in zip((*moments, decoded), theirs, strict=True):
        assert mine.shape == reference.shape
        assert np.abs(mine - reference).max() / np.abs(reference).max() < 1e-4


@pytest.mark.parametrize("size", [(40, 56), (41, 55), (64, 22)])
def test_small_models_agree_on_odd_pictures(size, small):
    model, folder = small
    agree(model, open_donor(folder, [FAMILY]), *size)


def test_conversion_is_verified_exact_and_loaded_by_diffusers(small, tmp_path):
    model, folder = small
    checks = [convert(open_donor(folder, [FAMILY]), tmp_path / "ours", "heirloom")]
    checks += [convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "diffusers")]
    for check in checks:
        assert (
            check.passed and check.reference == "diffusers" and 0 < check.max_error < 1e-4 and check.cosine > 0.999999
        )
    same(diffusers.AutoencoderKL.from_pretrained(tmp_path / "back"), model)


def same(loaded, model):
    assert loaded.config.scaling_factor == model.config.scaling_factor
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_wrong_weight_is_noticed(small):
    donor = open_donor(small[1], [FAMILY])
    values = {path: np.array(view) for path, view in donor.source.values.items()}
    values["decoder/up/0/resize/kernel"] *= 1.01
    check = FAMILY.verify(donor.cfg, values, donor.file, "diffusers")
    assert not check.passed and check.max_error > 1e-4


@pytest.mark.parametrize("kind", ["old", "bin"])
def test_files_of_older_releases(kind, small, tmp_path):
    """The names of sd-vae-ft-* on the hub, which diffusers renames; and a pickle under current ones."""
    model, folder = small
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."} if kind == "old" else {}
    tensors = {}
    for key, value in open_safetensors(folder / FILE).items():
        for new, before in names.items():
            key = key.replace(new, before)
        tensors[key] = np.array(value)
    there = tmp_path / kind
    there.mkdir()
    (there / "config.json").write_bytes((folder / "config.json").read_bytes())
    if kind == "old":
        with create_safetensors(
            there / FILE, {key: Tensor(value.shape, value.dtype) for key, value in tensors.items()}
        ) as out:
            for key, value in tensors.items():
                out[key][...] = value
        same(diffusers.AutoencoderKL.from_pretrained(there), model)
    else:
        write_torch(there / "diffusion_pytorch_model.bin", tensors)
    check = convert(open_donor(there, [FAMILY]), tmp_path / "ours", "heirloom")
    assert check.passed and check.reference == "diffusers" and check.max_error < 1e-4


def test_macs_are_what_torch_counts(small):
    from torch.utils.flop_counter import FlopCounterMode

    donor = open_donor(small[1], [FAMILY])
    model = diffusers.AutoencoderKL.from_pretrained(small[1])
    # Two products, which the counter sees: the fused kernel counts as nothing on CPUs.
    model.set_default_attn_processor()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 64))
    assert 2 * macs(donor.cfg, donor.model.spec) == counter.get_total_flops()


@pytest.mark.slow
def test_the_published_size_agrees_and_comes_back(seeded, tmp_path):
    """83,653,863 parameters in half precision, as many are published: bits are kept, f32 features agree."""
    model = autoencoder(seeded, **FULL).half()
    model.save_pretrained(tmp_path / "theirs")
    model.float()
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    donor = open_donor(tmp_path / "theirs", [FAMILY])
    assert parameters(donor.model.spec)["total"] == 83_653_863
    agree(model, donor, 64, 64)
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "diffusers", verify=False)
    original, returned = (open_safetensors(tmp_path / name / FILE) for name in ("theirs", "back"))
    assert original.keys() == returned.keys() and len(original) == 248
    for key, value in original.items():
        assert value.dtype == returned[key].dtype == np.float16 and value.tobytes() == returned[key].tobytes(), key
    same(diffusers.AutoencoderKL.from_pretrained(tmp_path / "back"), model)

"""transformers' ViTs without a classifier's plain head: read, written back, and loaded by transformers again."""

from dataclasses import replace

import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.errors import InputError, VerificationError
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from learngene.verify import verify
from learngene.zoo import FAMILY

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::heirloom.common.errors.Remark")]

# Every class and option is in the table of scripts/count_hf_vits.py: here is one of each layout and pooling.
WRITTEN_AS = {
    "ViTModel": "ViTModel",
    "Dinov2WithRegistersForImageClassification": "Dinov2WithRegistersForImageClassification",
    "SiglipVisionModel": "SiglipVisionModel",
    "CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection",
    "ViTMAEForPreTraining": "ViTModel",
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved(case)`: the folder of a case of scripts/count_hf_vits.py, and the model."""
    from count_hf_vits import save

    def make(case):
        folder = tmp_path_factory.mktemp("theirs")
        return folder, save(case, folder)

    return make


@pytest.mark.parametrize("case", WRITTEN_AS)
def test_transformers_agrees_and_loads_what_is_written(case, saved, tmp_path):
    import transformers

    donor = open_donor(saved(case)[0], [FAMILY])
    there = convert(donor, tmp_path / "ours", "heirloom")
    back = convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "hf")
    for check in (there, back):
        assert (check.passed, check.reference) == (True, "transformers") and 0 < check.max_error < 1e-5
    name = read_json(tmp_path / "back" / "config.json")["architectures"][0]
    assert name == WRITTEN_AS[case]
    how = dict(add_pooling_layer=donor.cfg.pooler) if name == "ViTModel" else {}
    _, loaded = getattr(transformers, name).from_pretrained(tmp_path / "back", output_loading_info=True, **how)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]


@pytest.mark.parametrize("case", ["SiglipForImageClassification", "CLIPForImageClassification"])
def test_a_classifier_made_of_an_image_tower_averages_its_patches(case, saved, tmp_path):
    donor = open_donor(saved(case)[0], [FAMILY])
    check = convert(donor, tmp_path / "ours", "heirloom")
    assert (check.passed, check.reference) == (True, "transformers") and 0 < check.max_error < 1e-5
    assert (donor.cfg.pool, donor.cfg.classes) == ("norm_mean", 5)
    with pytest.raises(InputError, match=r"no file of it computes the same\. Write --to timm"):
        convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "hf")
    config = read_json(donor.folder / "config.json")
    write_json(donor.folder / "config.json", config | dict(vision_config=config["vision_config"] | dict(new=1)))
    with pytest.raises(InputError, match=r"config\.json: vision_config: the field 'new' \(1\) is not known here"):
        open_donor(donor.folder, [FAMILY])


def test_a_setting_that_is_read_wrongly_fails_the_verification(saved):
    folder, _ = saved("Dinov2WithRegistersForImageClassification")
    for wrong in (dict(eps="1e-6"), dict(heads=4), dict(activation="gelu")):
        donor = open_donor(folder, [FAMILY], **wrong)
        check = verify(donor.cfg, donor.source.values, donor.file, "hf")
        assert not check.passed and check.max_error > 1e-4, wrong


def test_the_mean_of_the_patches_is_another_pooling(saved, tmp_path):
    donor = open_donor(saved("ViTMAEModel")[0], [FAMILY], pool="norm_mean")
    assert convert(donor, tmp_path / "ours", "heirloom").max_error < 1e-5
    with pytest.raises(VerificationError, match="features differ from those of transformers"):
        convert(open_donor(saved("ViTModel")[0], [FAMILY], pool="norm_mean"), tmp_path / "other", "heirloom")


@pytest.mark.parametrize("case", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_positions_of_a_dinov2_are_resampled_as_transformers_does(case, saved):
    """Without antialiasing, or with it where there are registers; a square of another size and rectangles."""
    folder, model = saved(case)
    donor = open_donor(folder, [FAMILY])
    params = {path: np.asarray(view) for path, view in donor.source.values.items()}
    for size in ((20, 20), (8, 20)):
        x = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
        with torch.no_grad():
            theirs = model(torch.from_numpy(x).permute(0, 3, 1, 2)).pooler_output.numpy()
        ours = np.asarray(donor.model.apply(params, x))
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
        other = replace(donor.cfg, resample={"plain": "antialiased", "antialiased": "plain"}[donor.cfg.resample])
        wrong = np.asarray(functional(FAMILY.module, other).apply(params, x))
        assert np.abs(wrong - theirs).max() > 1e-4 * np.abs(theirs).max()

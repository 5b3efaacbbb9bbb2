"""Pipeline folders: which are read, and which settings of a scheduler change the pictures."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.hub import absolute
from heirloom.common.checkpoint.pipeline import convert_pipeline, is_pipeline, main_part, parts_of, plain_weights
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from lit_jax import text_to_image
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.components import (
    Components,
    check_chain,
    check_pipeline,
    check_scheduler,
    class_names,
    copy_parts,
    find_components,
    other_scale,
    pipeline_of,
    write_parts_of,
)
from lit_jax.dit import DitConfig
from lit_jax.origin import read_origin
from lit_jax.pixart import PixArtConfig
from lit_jax.text_inputs import check_made_of
from lit_jax.text_origin import read_empty_text, same_encoder, write_empty_text

SIGMA = {"_class_name": "PixArtSigmaPipeline", "_diffusers_version": "0.42.0", "transformer": ["diffusers", "X"],
         "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None]}  # fmt: skip
# As diffusers 0.42 saves the scheduler of the public pipelines.
SCHEDULER = dict(
    _class_name="DPMSolverMultistepScheduler", _diffusers_version="0.42.0", algorithm_type="dpmsolver++",
    beta_end=0.02, beta_schedule="linear", beta_start=0.0001, dynamic_thresholding_ratio=0.995, euler_at_final=False,
    final_sigmas_type="zero", flow_shift=1.0, lambda_min_clipped=float("-inf"), lower_order_final=True,
    num_train_timesteps=1000, prediction_type="epsilon", rescale_betas_zero_snr=False, sample_max_value=1.0,
    solver_order=2, solver_type="midpoint", steps_offset=0, thresholding=False, time_shift_type="exponential",
    timestep_spacing="linspace", trained_betas=None, use_beta_sigmas=False, use_dynamic_shifting=False,
    use_exponential_sigmas=False, use_flow_sigmas=False, use_karras_sigmas=False, use_lu_lambdas=False,
    variance_type=None,
)  # fmt: skip


def write(folder, index, scheduler=None):
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def test_the_scheduler_of_the_public_pipelines_is_ours(tmp_path):
    root = write(tmp_path / "p", SIGMA, SCHEDULER)
    check_pipeline(root)
    assert is_pipeline(root) and parts_of(root) == ["transformer", "vae"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_class_name", "EulerDiscreteScheduler"),
        ("use_karras_sigmas", True),
        ("algorithm_type", "sde-dpmsolver++"),
        ("prediction_type", "v_prediction"),
        ("timestep_spacing", "trailing"),
        ("final_sigmas_type", "sigma_min"),
        ("solver_order", 3),
        ("beta_schedule", "scaled_linear"),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("lambda_min_clipped", -3.0),
        ("use_flow_sigmas", True),
        ("some_new_option", 1),
    ],
)
def test_a_setting_that_changes_pictures_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=name) as error:
        check_scheduler(Fields(SCHEDULER | {name: value}, "scheduler_config.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name, value in SCHEDULER.items() if value is False])
def test_a_null_means_off_for_what_diffusers_asks_whether_it_is_true(name):
    check_scheduler(Fields(SCHEDULER | {name: None}, "scheduler_config.json"))


def test_a_chain_that_a_schedulers_defaults_change_is_refused():
    """Of a field that is missing, the default of the class counts; CogVideoX shifts its signal-to-noise ratio too."""
    linear = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    cog = dict(_class_name="CogVideoXDDIMScheduler", **linear)
    check_chain(Fields(cog | {"snr_shift_scale": 1.0}, "s.json"))
    with pytest.raises(InputError, match=r"s.json: snr_shift_scale is missing; CogVideoXDDIMScheduler's default"):
        check_chain(Fields(cog, "s.json"))
    with pytest.raises(InputError, match=r"snr_shift_scale is 3.0; only models where it is 1.0"):
        check_chain(Fields(cog | {"snr_shift_scale": 3.0}, "s.json"))
    with pytest.raises(InputError, match=r"beta_start is missing; HeunDiscreteScheduler's default differs from 0.0001"):
        check_chain(Fields({"_class_name": "HeunDiscreteScheduler"}, "s.json"))
    check_chain(Fields({"_class_name": "DDIMScheduler"}, "s.json"))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("PixArtAlphaPipeline", "a PixArt-α"),
        ("SanaPipeline", "a Sana"),
        ("StableDiffusionPipeline", "a StableDiffusionPipeline"),
    ],
)
def test_other_pipelines_are_refused_by_name(tmp_path, kind, says):
    with pytest.raises(InputError, match=f"is {says}.*only PixArtSigmaPipeline is read; name the parts with --text"):
        check_pipeline(write(tmp_path / "p", SIGMA | {"_class_name": kind}))


def test_a_pipeline_with_perturbed_attention_is_read_without_it(tmp_path, remarks):
    check_pipeline(write(tmp_path / "p", SIGMA | {"_class_name": "PixArtSigmaPAGPipeline"}))
    assert remarks()[0].endswith("it is drawn without perturbed-attention guidance (PAG)")


def test_a_missing_part_is_one_line(tmp_path):
    with pytest.raises(InputError, match="sub-folder transformer/ is missing"):
        main_part(write(tmp_path / "p", SIGMA))


def test_a_student_next_to_a_transformer_belongs_to_the_pipeline_that_it_notes(tmp_path):
    theirs, mine = write(tmp_path / "theirs", SIGMA), write(tmp_path / "mine", SIGMA)
    (theirs / "transformer").mkdir()
    for name in ("transformer", "student"):
        (mine / name).mkdir()
        copy_parts(SimpleNamespace(folder=theirs / "transformer", known={}), mine / name)
    assert pipeline_of(SimpleNamespace(folder=mine / "transformer")) == mine
    assert pipeline_of(SimpleNamespace(folder=mine / "student")) == theirs
    assert pipeline_of(SimpleNamespace(folder=tmp_path / "alone")) is None


def test_a_copy_keeps_the_parts_that_a_model_was_trained_with(tmp_path):
    (tmp_path / "model").mkdir()
    write_parts_of(tmp_path / "model", "embedded:emoji", "vae")
    write_empty_text(tmp_path / "model", np.ones((2, 3)))
    (tmp_path / "copy").mkdir()
    copy_parts(SimpleNamespace(folder=tmp_path / "model", known={}), tmp_path / "copy")
    parts = json.loads((tmp_path / "copy" / "pipeline.json").read_text())
    assert parts == {"text_encoder": "embedded:emoji", "autoencoder": str(Path("vae").absolute())}
    assert same_encoder(read_empty_text(tmp_path / "copy"), np.ones((2, 3), np.float32))
    (tmp_path / "copy" / "empty_text.json").write_text("{}")
    with pytest.raises(InputError, match=r"empty_text\.json is damaged: remove it"):
        read_empty_text(tmp_path / "copy")


def test_parts_are_noted_so_that_they_are_found_from_another_folder(tmp_path, monkeypatch):
    for name in ("t5", "vae", "model", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "t5" / "spiece.model").write_text("")
    monkeypatch.chdir(tmp_path)
    write_parts_of(tmp_path / "model", "t5", "../" + tmp_path.name + "/vae")
    monkeypatch.chdir(tmp_path / "elsewhere")
    donor = foreign(tmp_path / "model", None)
    assert find_components(donor).text == tmp_path / "t5" and find_components(donor).autoencoder == tmp_path / "vae"
    (tmp_path / "vae").rmdir()
    gone = r"model/pipeline.json: its autoencoder .*vae does not exist any more; give --autoencoder"
    with pytest.raises(InputError, match=gone):
        find_components(donor)
    assert find_components(donor, autoencoder=str(tmp_path)).autoencoder == tmp_path
    for source in ("", "embedded:emoji", "hf:org/name", "memory://bucket/vae"):
        assert absolute(source) == source


def test_a_cache_of_a_run_is_its_own_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = SimpleNamespace(autoencoder="vae", text_encoder="embedded:emoji", ratios="ten")
    noted = {"data": json.loads(json.dumps(asdict(SourceConfig()))), "text_encoder": "embedded:emoji"}
    for source in ("vae", str(tmp_path / "vae")):
        cache = SimpleNamespace(folder=tmp_path, about=noted | {"autoencoder": source})
        check_made_of(cfg, SourceConfig(), cache)
    with pytest.raises(InputError, match=r"was made with autoencoder .*vae', the recipe has .*other'"):
        check_made_of(SimpleNamespace(**vars(cfg) | {"autoencoder": "other"}), SourceConfig(), cache)


@pytest.mark.parametrize(
    ("noted", "words"),
    [
        ({"scaling_factor": "0.13"}, "scaling_factor is '0.13', and must be a number"),
        ({"scaling_factor": 0}, "scaling_factor is 0, and must be a finite number above 0"),
        ({"pipeline": ["a"]}, "pipeline is .'a'., and must be a string"),
        ({"text-encoder": "t5"}, "the field 'text-encoder' .* is not known here"),
    ],
)
def test_a_damaged_note_of_parts_is_one_line(noted, words, tmp_path):
    (tmp_path / "pipeline.json").write_text(json.dumps(noted))
    with pytest.raises(InputError, match=f"pipeline.json: {words}"):
        find_components(foreign(tmp_path, PixArtConfig()))
    with pytest.raises(InputError, match=f"pipeline.json: {words}"):
        other_scale(foreign(tmp_path, PixArtConfig()), 0.5, "cache")


@pytest.mark.parametrize("features", [None, [1.0, 2.0], "a", [[1.0], [2.0, 3.0]]])
def test_damaged_features_of_the_empty_text_are_one_line(features, tmp_path):
    (tmp_path / "empty_text.json").write_text(json.dumps({"features": features}))
    with pytest.raises(InputError, match=r"empty_text\.json is damaged: remove it"):
        read_empty_text(tmp_path)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({}, "says nothing of an autoencoder"),
        ({"model": {}}, "says nothing of an autoencoder"),
        ({"model": {"scaling_factor": "a"}}, ": scaling_factor is 'a', and must be a finite number"),
        ({"model": ["a"]}, "is .'a'., not an object"),
    ],
)
def test_a_damaged_note_of_the_autoencoder_is_one_line(saved, words, tmp_path):
    (tmp_path / "autoencoder.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=f"autoencoder.json.*{words}"):
        read_origin(tmp_path)


def test_a_transformer_named_as_the_working_folder_belongs_to_its_pipeline(tmp_path, monkeypatch):
    root = write(tmp_path / "p", SIGMA)
    (root / "transformer").mkdir()
    monkeypatch.chdir(root / "transformer")
    assert pipeline_of(SimpleNamespace(folder=Path())) == root


@pytest.mark.parametrize("name", ["transformer", "unet"])
def test_a_model_next_to_its_average_is_named_by_the_user(tmp_path, name):
    """diffusers' trainers write both."""
    for folder in (name, f"{name}_ema"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    assert is_pipeline(tmp_path)
    with pytest.raises(InputError, match=f"holds {name}/ and its average: name .*{name}_ema, or .*{name} for the raw"):
        main_part(tmp_path)
    with pytest.raises(InputError, match="and its average"):
        convert_pipeline(tmp_path, tmp_path / "out", "heirloom", lambda part: None)


def test_a_part_in_two_precisions_is_read_as_diffusers_does(tmp_path, remarks):
    root = write(tmp_path / "p", SIGMA)
    for name, files in (("transformer", ("x.fp16.safetensors", "x.safetensors")), ("vae", ("x.bf16.safetensors",))):
        (root / name).mkdir()
        for file in files:
            (root / name / file).write_text("")
    assert main_part(root) == root / "transformer" / "x.safetensors"
    assert "transformer: using x.safetensors, not x.fp16.safetensors; to use another file" in remarks()[0]
    assert plain_weights(root / "vae") == root / "vae"  # the only one
    opened = []

    def open_part(part):
        opened.append(part)
        raise InputError("stop")

    with pytest.raises(InputError, match="stop"):
        convert_pipeline(root, tmp_path / "out", "heirloom", open_part)
    assert opened == [root / "transformer" / "x.safetensors"]
    (root / "transformer" / "y.safetensors").write_text("")  # another model
    assert plain_weights(root / "transformer") == root / "transformer" and len(remarks()) == 1


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_pickle_goes_before_the_variant_of_a_part_in_safetensors(variant, tmp_path, remarks):
    for name in ("model.bin", f"model.{variant}.safetensors"):
        (tmp_path / name).write_text("")
    assert plain_weights(tmp_path) == tmp_path / "model.bin"
    (said,) = remarks()
    assert f": using model.bin, not its variant model.{variant}.safetensors; to use another file" in said
    (tmp_path / "model.safetensors").write_text("")
    assert plain_weights(tmp_path) == tmp_path / "model.safetensors"


def test_the_tokenizer_of_a_text_encoder_that_is_a_file_lies_next_to_its_folder(tmp_path):
    for name, file in (("text_encoder", "model.safetensors"), ("tokenizer", "spiece.model"), ("vae", "x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    parts = dict(text=str(tmp_path / "text_encoder" / "model.safetensors"), autoencoder=str(tmp_path / "vae"))
    assert find_components(foreign(tmp_path / "alone", None), **parts).tokenizer == tmp_path / "tokenizer"


def test_the_tokenizer_is_the_text_encoders_own(tmp_path):
    """FLUX has T5 in text_encoder_2; an encoder with a tokenizer in its folder has no need of a neighbour's."""
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "t5", "vae"):
        (tmp_path / name).mkdir()
    for name in ("tokenizer", "tokenizer_2", "t5"):
        (tmp_path / name / "tokenizer.json").write_text("{}")
    for encoder, name in (("text_encoder_2", "tokenizer_2"), ("text_encoder", "tokenizer"), ("t5", "t5")):
        parts = dict(text=str(tmp_path / encoder), autoencoder=str(tmp_path / "vae"))
        assert find_components(foreign(tmp_path / "alone", None), **parts).tokenizer == tmp_path / name
    (tmp_path / "tokenizer_2" / "tokenizer.json").unlink()
    parts["text"] = str(tmp_path / "text_encoder_2")
    with pytest.raises(InputError, match=r"text_encoder_2: no tokenizer \(tokenizer.json or spiece.model\) in it"):
        find_components(foreign(tmp_path / "alone", None), **parts)


def test_parts_that_are_named_need_no_pipeline(tmp_path):
    """Neither one that is gone, nor one with another scheduler."""
    for name in ("text_encoder", "tokenizer", "vae", "student"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_text("")
    parts = dict(text=str(tmp_path / "text_encoder"), autoencoder=str(tmp_path / "vae"))
    (tmp_path / "student" / "pipeline.json").write_text(json.dumps({"pipeline": str(tmp_path / "gone")}))
    other = write(tmp_path / "other", SIGMA, SCHEDULER | {"_class_name": "EulerDiscreteScheduler"})
    (other / "transformer").mkdir()
    for folder, words in (
        (tmp_path / "student", "its pipeline .*gone does not exist any more; give --pipeline DIR, or --text-encoder"),
        (other / "transformer", "heirloom draws with its own sampler: remove scheduler/, or name the parts with"),
    ):
        assert find_components(foreign(folder, None), **parts).autoencoder == tmp_path / "vae"
        for name in parts:
            with pytest.raises(InputError, match=words):
                find_components(foreign(folder, None), **{name: parts[name]})


def foreign(folder, cfg, format="diffusers"):
    return SimpleNamespace(folder=folder, path=folder, cfg=cfg, format=format, known={})


def test_names_of_classes_are_those_of_the_pipelines_index(tmp_path):
    root = tmp_path / "dit"
    (root / "transformer").mkdir(parents=True)
    names = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "shark"}
    (root / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    donor = foreign(root / "transformer", DitConfig(classes=3))
    assert class_names(donor) == ("tench, Tinca tinca", "goldfish", "shark")
    assert class_names(foreign(root / "transformer", DitConfig(classes=4))) is None
    assert class_names(foreign(tmp_path / "alone", DitConfig(classes=3))) is None


def test_latents_of_another_scale_than_a_foreign_models_are_said(tmp_path):
    dit, sigma = foreign(tmp_path / "dit.pt", DitConfig()), foreign(tmp_path / "sigma.pth", PixArtConfig())
    assert other_scale(dit, 0.18215, "cache") == other_scale(sigma, 0.13025, "cache") == ""
    assert "cache has latents with scaling_factor 0.13025, and published models" in other_scale(dit, 0.13025, "cache")
    assert "were trained on latents with 0.13025" in other_scale(sigma, 0.18215, "cache")
    assert other_scale(foreign(tmp_path, DitConfig(), "heirloom"), 0.13025, "cache") == ""
    root = tmp_path / "pipeline"
    (root / "vae").mkdir(parents=True)
    (root / "transformer").mkdir()
    (root / "model_index.json").write_text("{}")
    (root / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.5}))
    inside = foreign(root / "transformer", DitConfig())
    assert other_scale(inside, 0.5, "cache") == "" and "with 0.5:" in other_scale(inside, 0.18215, "cache")
    for wrong in (None, "0.13", 0):
        (root / "vae" / "config.json").write_text(json.dumps({"scaling_factor": wrong}))
        with pytest.raises(InputError, match=r"vae/config.json: scaling_factor is .*, and must be a"):
            other_scale(inside, 0.5, "cache")


def test_a_pipelines_own_autoencoder_is_not_doubted(tmp_path, monkeypatch, remarks):
    root = write(tmp_path / "pipeline", SIGMA)
    (root / "vae").mkdir()
    (root / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.5}))
    monkeypatch.setattr(text_to_image, "open_text", lambda *args, **how: SimpleNamespace(width=4096))
    for scale, doubted in ((0.5, False), (0.13025, True)):
        autoencoder = SimpleNamespace(cfg=AutoencoderConfig(scaling_factor=scale))
        monkeypatch.setattr(text_to_image, "open_donor", lambda *args, vae=autoencoder: vae)
        donor = foreign(root / "transformer", PixArtConfig())
        text_to_image.open_text_to_image(donor, Components(root, root, root / "vae"), start())
        assert any("trained on latents with 0.5: name" in said for said in remarks()) == doubted

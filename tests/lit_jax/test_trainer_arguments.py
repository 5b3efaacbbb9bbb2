"""Arguments of trainers next to the tensors of a DiT or a PixArt: what they say, what is doubtful, what is refused."""

import json

import numpy as np
import pytest

from heirloom.common.checkpoint.family import Found
from heirloom.common.errors import InputError
from heirloom.common.nn.position import sincos
from lit_jax import formats, pixart_formats

SHARED = {
    "x_embedder.proj.weight": (32, 4, 2, 2),
    "blocks.0.attn.qkv.weight": (96, 32),
    "blocks.1.mlp.fc1.weight": (64, 32),
    "blocks.0.mlp.fc1.weight": (64, 32),
    "final_layer.linear.weight": (32, 32),
}
DIT = {"y_embedder.embedding_table.weight": (6, 32)}
PIXART = {"t_block.1.weight": (192, 32), pixart_formats.CAPTION: (32, 16), pixart_formats.NULL_TEXT: (300, 16)}
EVERY = "only models that predict noise, of latents that are scaled alone, on a linear chain can be sampled here"


def tensors(own=DIT, **change):
    """Zeros in the shapes that tell the sizes of a model of width 32, two layers and latents of side 8."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in (SHARED | own | change).items()}
    return zeros | {"pos_embed": sincos(4, 4, 32).reshape(1, 16, 32)}


def read(about, tmp_path, given=None, **settings):
    return formats.FORMATS[0].read_config(Found(given or tensors(), tmp_path, about, settings))


def read_pixart(about, tmp_path):
    given = tensors(PIXART) | {"pos_embed": sincos(4, 4, 32, 2.0).reshape(1, 16, 32)}
    return pixart_formats.FORMATS[0].read_config(Found(given, tmp_path, about))


def reasons(found):
    return {guess.name: guess.why for guess in found.guesses}


def test_what_the_model_was_made_with_is_read(tmp_path):
    """Lightning's hyper_parameters, arguments by another name, or the config.json of a folder of the hub."""
    made = dict(hidden_size=32, num_heads=4, class_dropout_prob=0.0)
    for about in ({"hyper_parameters": made}, {"model_args": made}):
        found = read(about, tmp_path)
        assert (found.cfg.heads, found.cfg.classes, found.cfg.null_class) == (4, 6, False)
    bare = {key: value for key, value in tensors().items() if key != "pos_embed"}
    (tmp_path / "config.json").write_text(json.dumps(dict(made, input_size=8, class_dropout_prob=0.1)))
    found = read({}, tmp_path, bare)
    assert (found.cfg.heads, found.cfg.size, found.cfg.classes, found.cfg.null_class) == (4, 8, 5, True)
    linear = {key: value for key, value in tensors().items() if "qkv" not in key}
    linear |= {"blocks.0.attn.dwc.weight": np.zeros((16, 1, 3, 3), np.float32)}
    found = read({"hyper_parameters": made}, tmp_path / "none", linear)
    assert found.cfg.heads == 2  # its own, not those of the DiT in the arguments


@pytest.mark.parametrize("place", ["args", "hyper_parameters", "config", "cfg"])
def test_arguments_are_read_where_trainers_keep_them(place, tmp_path):
    found = read({place: {"model": dict(num_classes=6, prediction_type="epsilon", num_heads=4)}}, tmp_path)
    assert found.cfg.classes == 6 and found.guesses == ()
    with pytest.raises(InputError, match=r"trained with model.parameterization v; only models with parameterization"):
        read({place: {"model": dict(parameterization="v")}}, tmp_path)


@pytest.mark.parametrize("group", ["model", "dit_config", "net", "DiT", "denoiser"])
def test_settings_of_another_network_are_not_the_models(group, tmp_path):
    others = {"encoder": {"num_heads": 16}, "data": {"num_classes": 6}, "teacher": {"model": "SiT-XL/2"}}
    others |= {"decoder": {"params": {"num_heads": 8, "input_size": 16}}}
    found = read({"config": others | {group: {"num_heads": 4}}}, tmp_path)
    assert found.cfg.heads == 4 and (found.cfg.classes, found.cfg.size) == (5, 8)
    assert reasons(found).keys() == {"classes", "prediction"}
    assert reasons(read({"config": others}, tmp_path)).keys() == {"classes", "prediction", "heads"}
    assert reasons(read({"encoder_config": {"num_heads": 16}}, tmp_path)).keys() == {"classes", "prediction", "heads"}


def test_groups_that_disagree_are_a_guess_that_names_them(tmp_path):
    fits = {"encoder": dict(hidden_size=32, num_heads=16), "vit": dict(hidden_size=48, num_heads=2)}
    found = read({"config": fits | {"net": dict(num_heads=4)}}, tmp_path)
    assert found.cfg.heads == 4
    assert reasons(found)["heads"].endswith("tensors say net.num_heads 4 and encoder.num_heads 16")
    assert reasons(read({"config": fits}, tmp_path))["heads"].endswith("say encoder.num_heads 16")  # by its width alone
    assert "heads" not in reasons(read({"config": fits | {"net": dict(num_heads=16)}}, tmp_path))
    found = read({"args": dict(num_heads=np.int64(4), num_classes=np.int64(6))}, tmp_path)
    assert (type(found.cfg.heads), type(found.cfg.classes)) == (int, int) and found.cfg.classes == 6
    found = read({"config": {"model": dict(depth=7, num_heads=4)}, "args": dict(num_heads=8)}, tmp_path)
    assert found.cfg.heads == 8 and "heads" not in reasons(found)  # the other is not two layers deep
    both = {"model": dict(input_size=4), "net": dict(input_size=16)}
    assert "size" not in reasons(read({"config": both}, tmp_path))  # the positions tell


def test_arguments_that_are_not_understood_are_remarked(tmp_path, remarks):
    read({"args": ["train.py", "--prediction", "velocity"]}, tmp_path)
    assert "the saved 'args' are a list without field names, so heirloom could not check" in remarks()[0]
    read({"args": dict(linear_start=1e-4, linear_end=0.02, beta_schedule="linear", schedule="cosine")}, tmp_path)
    assert "'linear' means scaled-linear betas" in " ".join(remarks())


def test_settings_of_other_things_are_no_reason_to_refuse(tmp_path, remarks):
    usual = dict(v_prediction=False, zero_snr="none", use_flow=0, noise_schedule="linear", noise_scheduler="DDPM")
    usual |= dict(lr_scheduler="cosine", target="noise", optim=dict(schedule="cosine"), vae_scale_factor=8, ema_v=1)
    usual |= dict(sampler=dict(timesteps=250), eval=dict(timesteps=50), discriminator=dict(objective="hinge"))
    usual |= dict(noise_type="gaussian", betas=(0.9, 0.999), scheduler=dict(type="cosine"), pred_sigma=True)
    usual |= dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=None, snr_shift_scale=1)
    usual |= dict(data=dict(type="optical_flow"), path_type="none", test_data=dict(target="sample"))
    usual |= dict(unipc_scheduler=dict(predict_x0=True), sampling=dict(num_timesteps=20, predict_x0=True))
    usual |= dict(augmentation=dict(noise_steps=3), predict_x0=False, noise_pred=True, cosine_schedule=False)
    usual |= dict(train_sampling_steps=1000, noise_shift=1, vae_shift=0.0, standardize_latents=False, x_pred="eps")
    usual |= dict(diffusion_type="ddpm", cosine_annealing=True, alpha_schedule="linear", timesteps_per_batch=64)
    found = read({"args": usual | {"num_heads": 4}}, tmp_path)
    assert found.known == {} and remarks() == []
    assert "prediction" not in reasons(read({"args": dict(model_mean_type="ModelMeanType.EPSILON")}, tmp_path))


@pytest.mark.parametrize("setting", [dict(schedule="cosine"), dict(schedule_type="cosine"), dict(cosine_schedule=True)])
def test_a_schedule_that_may_be_the_learning_rates_is_remarked(setting, tmp_path, remarks):
    read({"args": dict(num_heads=4, model="DiT-S/2", num_classes=5) | setting}, tmp_path)
    (said,) = remarks()
    assert said.endswith(", saved with the tensors, is assumed to be the learning-rate schedule")
    with pytest.raises(InputError, match=EVERY):
        read({"args": dict(diffusion=setting)}, tmp_path)


SAID = [
    (dict(model="SiT-S/2", path_type="Linear", prediction="velocity"), f"trained with model SiT-S/2; {EVERY}"),
    (dict(path_type="GVP"), "trained with path_type GVP; only models with path_type none"),
    (dict(prediction="velocity"), "trained with prediction velocity; only models with prediction noise"),
    (dict(linear_start=0.0015, linear_end=0.0195), "trained with linear_start 0.0015; only models with .* 0.0001"),
    (dict(timesteps=4000), "trained with timesteps 4000"),
    (dict(schedule="squaredcos_cap_v2"), "trained with schedule squaredcos_cap_v2"),
    (dict(model="DiT-S/2", noise_schedule="squaredcos_cap_v2"), "trained with noise_schedule squaredcos_cap_v2"),
    (dict(model="DiT-S/2", predict_xstart=True), "trained with predict_xstart True"),
    (dict(model="DiT-S/2", diffusion_steps=4000), "trained with diffusion_steps 4000"),
    (dict(predictionType="v_prediction"), "trained with predictionType v_prediction; only models with .* noise"),
    (dict(model="DiT-S/2", rescale_betas_zero_snr=True), "trained with rescale_betas_zero_snr True"),
    (dict(beta_start=0.00085), "trained with beta_start 0.00085; only models with beta_start 0.0001"),
    (dict(betaSchedule="cosine"), "trained with betaSchedule cosine; only models with beta_schedule linear"),
    (dict(snr_shift_scale=3.0), "trained with snr_shift_scale 3.0"),
    (dict(noise_schedule="linear_flow"), "trained with noise_schedule linear_flow"),
    (dict(sampler=dict(prediction_type="v_prediction")), "trained with sampler.prediction_type v_prediction"),
    *(
        ({name: value}, f"trained with {name} {value}; {EVERY}")
        for name, value in {
            "v_prediction": True,
            "enforce_zero_terminal_snr": True,
            "v_parameterization": True,
            "pred_v": 1,
            "predict_velocity": "true",
            "zero_snr": True,
            "zsnr": True,
            "use_flow_matching": True,
            "useRectifiedFlow": True,
            "noise_scheduler": "cosine",
            "schedule_name": "cosine",
            "target": "v",
            "pred": "v",
            "loss_type": "flow_match",
            "diffusion_type": "rectified",
            "noise_type": "flow",
            "betas": "cosine",
            "scheduler": "FlowMatchEulerDiscrete",
            "vis_sampler": "flow_dpm-solver",
            "latent_norm": True,
            "shift_factor": 0.1159,
            "latents_mean": "stats.pt",
            "latents_std": "stats.pt",
        }.items()
    ),
    *(
        (dict(model="DiT-S/2") | {name: value}, f"trained with {name} {value}; only models ")
        for name, value in {
            **dict.fromkeys(("pred_x0", "predict_x0", "x0_pred", "x_prediction", "predict_x_start"), True),
            **dict.fromkeys(("predict_epsilon", "predict_noise", "epsilon_prediction", "pred_eps"), False),
            **dict.fromkeys(("num_timesteps", "n_timesteps", "noise_steps", "train_timesteps"), 4000),
            "train_sampling_steps": 4000,
            "model_mean_type": "ModelMeanType.START_X",
            "diffusion_type": "edm",
            "alpha_schedule": "cosine",
            "cosine_noise": True,
            "noise_shift": 2.0,
            "standardize_latents": True,
            "use_latent_stats": True,
            "vae_shift": 0.06,
        }.items()
    ),
    (dict(diffusion=dict(schedule="cosine")), "trained with diffusion.schedule cosine"),
    (dict(diffusion=dict(flow_matching=True)), "trained with diffusion.flow_matching True"),
    (dict(scheduler=dict(type="flow_match")), "trained with scheduler.type flow_match"),
    (dict(noise_scheduler=dict(name="cosine")), "trained with noise_scheduler.name cosine"),
    (dict(vae=dict(latents_mean=[0.1, 0, 0, 0])), "trained with vae.latents_mean .0.1, 0, 0, 0.; "),
    (dict(latents_std=[1, 2, 1, 1]), "trained with latents_std .1, 2, 1, 1.; "),
    (dict(latents_scale=[1, 2, 1, 1], latents_bias=[0] * 4), "trained with latents_scale .1, 2, 1, 1.; "),
]


@pytest.mark.parametrize(("args", "words"), SAID)
def test_models_that_predict_something_else_are_refused(args, words, tmp_path):
    for reader in (read, read_pixart):
        with pytest.raises(InputError, match=words):
            reader({"args": args}, tmp_path)


def test_a_refusal_of_a_setting_of_something_else_can_be_overruled(tmp_path, remarks):
    with pytest.raises(InputError, match=r"trained with aux.objective hinge; .*, add --set prediction=noise"):
        read({"args": {"aux": {"objective": "hinge"}}}, tmp_path)
    read({"args": {"aux": {"objective": "hinge"}, "num_heads": 4}}, tmp_path, prediction="noise")
    (said,) = remarks()
    assert "trained with aux.objective hinge; " in said and "prediction=noise was given" in said


def test_a_pixarts_own_arguments_are_read(tmp_path):
    found = read_pixart({"config": dict(scale_factor=0.18215, num_heads=8, prediction="noise")}, tmp_path)
    assert found.known == {"scale": 0.18215} and found.guesses == ()
    assert (found.cfg.heads, found.cfg.cross_heads) == (8, 8)
    assert reasons(read_pixart({}, tmp_path)).keys() == {"heads", "prediction"}


@pytest.mark.parametrize(
    ("args", "scale"),
    [
        (dict(scale_factor=0.5, rope=dict(scale_factor=2.0), upsampler=dict(scale_factor=2)), 0.5),
        (dict(model=dict(params=dict(scale_factor=0.5))), 0.5),
        (dict(scale_factor=2.0, first_stage=dict(scale_factor=0.5)), 0.5),
        (dict(scale_factor=2.0, vae_scale_factor=0.5), 0.5),
        (dict(latents_scale=[0.5] * 4, latents_bias=[0.0] * 4), 0.5),
        (dict(latents_std=[2.0] * 4, latents_mean=0.0), 0.5),
        (dict(scale_factor=0.5, vae=dict(latent_std=2.0)), 0.5),
        (dict(rope=dict(scale_factor=2.0)), None),
        (dict(model=dict(upsampler=dict(scale_factor=2.0))), None),
        (dict(vae_scale_factor=8), None),
        (dict(vae_scale=0.5), 0.5),
        (dict(vae_scaling=0.5), 0.5),
    ],
)
def test_the_scale_of_latents_is_that_of_an_autoencoder_or_of_the_top_level(args, scale, tmp_path, remarks):
    assert read({"config": args}, tmp_path).known.get("scale") == scale and remarks() == []


def test_of_scales_that_differ_none_is_taken_and_this_is_said(tmp_path, remarks):
    args = {"vae": dict(scaling_factor=0.5), "latent_scale": 0.25}
    assert read({"args": args}, tmp_path).known == {}
    assert remarks() == [
        "vae.scaling_factor 0.5 and latent_scale 0.25, saved with the tensors, are different scales of latents: none"
        " of them is taken"
    ]

"""Fields of foreign configs that change what a CLIP computes without changing a shape: read, or refused by name."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.errors import InputError, Remark
from learngene.zoo import FAMILY as LEARNGENE


@pytest.fixture
def folder(goldens, tmp_path):
    """`folder(name, edit)`: a copy of a golden whose config `edit` has changed."""

    def make(name, edit):
        copy = Path(shutil.copytree(goldens / name, tmp_path / f"{len(list(tmp_path.iterdir()))}" / name))
        file = next(f for f in copy.glob("*config.json"))
        config = json.loads(file.read_text())
        edit(config)
        file.write_text(json.dumps(config))
        return copy

    return make


@pytest.fixture
def read(folder, families):
    return lambda name, edit: open_donor(folder(name, edit), families).cfg


@pytest.fixture
def plain(goldens, families):
    return lambda name: open_donor(goldens / name, families).cfg


def text(**fields):
    return lambda config: config["text_config"].update(fields)


def image(**fields):
    return lambda config: config["vision_config"].update(fields)


def top(**fields):
    return lambda config: config.update(fields)


def partial_dict(config):
    """As in old repositories: sizes alone, under another name."""
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    config["text_config_dict"] = {name: config["text_config"][name] for name in sizes}


def test_a_config_dict_wins_with_the_defaults_of_what_it_leaves_out(read, plain):
    """transformers' own rule: activation, eps and end token are its defaults again, whatever text_config says."""
    cfg, before = read("hf_gelu", partial_dict), plain("hf_gelu")
    assert (before.text.activation, before.text.eps, before.text.eot) == ("gelu", 1e-6, 40)
    assert cfg.text == replace(before.text, activation="quick_gelu", eps=1e-5, eot=49407) and cfg.image == before.image


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (top(model_type="align"), "model_type is 'align'; only models where it is 'clip' or 'metaclip_2' can be read"),
        (top(model_type="metaclip_2"), "text_config: model_type is 'clip_text_model'; .* 'metaclip_2_text_model'"),
        (text(model_type="chinese_clip_text_model"), "text_config: model_type is 'chinese_clip_text_model'"),
        (text(hidden_size="16"), "text_config: hidden_size is '16', and must be a whole number"),
        (text(num_hidden_layers=-1), "text_config: num_hidden_layers is -1, and must be from 1"),
        (text(eos_token_id=[40]), r"text_config: eos_token_id is \[40\], and must be a whole number"),
        (text(layer_norm_eps="1e-5"), "text_config: layer_norm_eps is '1e-5', and must be a number"),
        (text(position_embedding_type="relative_key"), "text_config: the field 'position_embedding_type'"),
        (image(image_size=[32, 16]), r"vision_config: image_size is \[32, 16\]; only squares can be read"),
        (image(num_channels=1), "vision_config: num_channels is 1; only models where it is 3 can be read"),
        (image(hidden_act="relu"), "hidden_act is 'relu'; only 'gelu_python', 'gelu'"),
        (image(use_head=True), "vision_config: the field 'use_head'"),
        (top(quantization_config={"bits": 4}), "the field 'quantization_config'"),
        (top(text_config=[1]), r"text_config is \[1\], not an object"),
        (top(projection_dim=None), "tensor .* has shape|projection_dim is None"),
    ],
)
def test_a_hugging_face_config_is_read_or_refused(edit, message, folder, families):
    with pytest.raises(InputError, match=message) as error:
        open_donor(folder("hf_gelu", edit), families)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_old_configs_have_an_end_token_in_each_tower(read, plain):
    """As openai/clip-vit-base-patch32: null in the image tower, where it says nothing."""
    assert read("hf_gelu", image(eos_token_id=None, bos_token_id=None)) == plain("hf_gelu")


def test_a_square_may_be_written_as_two_sides(read, plain):
    assert read("hf_gelu", image(image_size=[32, 32], patch_size=[8, 8])) == plain("hf_gelu")


def model(**fields):
    return lambda config: config["model_cfg"].update(fields)


def vision_cfg(**fields):
    return lambda config: config["model_cfg"]["vision_cfg"].update(fields)


def text_cfg(**fields):
    return lambda config: config["model_cfg"]["text_cfg"].update(fields)


def test_open_clips_fields_that_shapes_cannot_tell_are_read(read, plain):
    before = plain("open_clip_f16")
    assert before.text.activation == "quick_gelu" and before.text.eot is None
    assert read("open_clip_f16", text_cfg(pool_type="eos", eos_id=1)).text == replace(before.text, eot=1)
    assert read("open_clip_f16", text_cfg(norm_kwargs={"eps": 1e-6})).text == replace(before.text, eps=1e-6)
    assert read("open_clip_f16", vision_cfg(norm_kwargs={"eps": 1e-6})).image == replace(before.image, eps=1e-6)
    assert read("open_clip_f16", text_cfg(pool_type="first")).text == replace(before.text, pool="first")
    assert read("open_clip_f16", text_cfg(no_causal_mask=True)).text == replace(before.text, causal=False)
    assert read("open_clip_f16", vision_cfg(pool_type="avg")).image == replace(before.image, pool="norm_mean")
    assert read("open_clip_f16", model(quick_gelu=False)).text == replace(before.text, activation="gelu")

    def tanh(config):
        config["model_cfg"]["quick_gelu"] = False
        config["model_cfg"]["vision_cfg"]["act_kwargs"] = {"approximate": "tanh"}

    cfg = read("open_clip_f16", tanh)
    assert (cfg.image.activation, cfg.text.activation) == ("gelu_tanh", "gelu")


def test_open_clips_own_model_file_is_told_from_its_folders(read):
    def bare(config):
        model = config.pop("model_cfg")
        config |= model

    with pytest.raises(InputError, match=r"open_clip_config\.json: has no 'model_cfg': put open_clip's config"):
        read("open_clip_f16", bare)


@pytest.mark.parametrize(
    "harmless",
    [
        vision_cfg(patch_dropout=0.5, output_tokens=True),
        vision_cfg(final_ln_after_pool=True),
        text_cfg(tokenizer_kwargs={"clean": "lower"}, pad_id=0),
    ],
)
def test_open_clips_fields_that_change_nothing_are_passed_over(harmless, read, plain):
    """A norm after the pooling is the same as before it where a single token is picked."""
    assert read("open_clip_f16", harmless) == plain("open_clip_f16")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (text_cfg(pool_type="none"), "text_cfg: pool_type is 'none'"),
        (text_cfg(embed_cls=True), "text_cfg: embed_cls is True"),
        (text_cfg(tokenizer_kwargs={"clean": "whitespace"}), "text_cfg: tokenizer_kwargs: clean is 'whitespace'"),
        (text_cfg(tokenizer_kwargs={"reduction_mask": "shuffle"}), "tokenizer_kwargs: reduction_mask is 'shuffle'"),
        (text_cfg(proj_bias=True), "text_cfg: proj_type with proj_bias is affine, and the weights have linear"),
        (text_cfg(proj_type="mlp"), "text_cfg: proj_type is 'mlp'"),
        (text_cfg(ls_init_value=0.1), "text_cfg: ls_init_value is 0.1, and the weights have None"),
        (text_cfg(hf_model_name="roberta-base"), "text_cfg: hf_model_name is 'roberta-base'"),
        (text_cfg(heads="2"), "text_cfg: heads is '2', and must be a whole number"),
        (text_cfg(layers=7), "text_cfg: layers is 7, and the weights have 3"),
        (text_cfg(context_length=77), "context_length is 77, and the weights have 12; open_clip resizes"),
        (vision_cfg(pool_type="none"), "vision_cfg: pool_type is 'none'"),
        (vision_cfg(attentional_pool=True), "vision_cfg: attentional_pool is True"),
        (vision_cfg(no_ln_pre=True), "vision_cfg: no_ln_pre is True"),
        (vision_cfg(ls_init_value=1e-5), "vision_cfg: ls_init_value is 1e-05"),
        (vision_cfg(qk_norm=True), "vision_cfg: qk_norm is True"),
        (vision_cfg(timm_model_name="vit_base_patch16_224"), "vision_cfg: timm_model_name is 'vit_base_patch16_224'"),
        (vision_cfg(timm_model_name="vit_base_patch16_224.augreg_in21k"), "augreg_in21k'; only models where"),
        (vision_cfg(timm_model_name="swin_tiny"), "timm_model_name is 'swin_tiny'; of timm only its VisionTransformer"),
        (vision_cfg(timm_model_name="vit_relpos_base_patch16_224"), "which has relative positions"),
        (vision_cfg(image_size=[32, 16]), "vision_cfg: image_size is .*; only squares can be read"),
        (vision_cfg(image_size=40), "image_size is 40, and the weights have 32; open_clip resizes"),
        (vision_cfg(mlp_ratio=2.0), "vision_cfg: mlp_ratio is 2, and the weights have"),
        (vision_cfg(norm_kwargs={"bias": False}), "vision_cfg: norm_kwargs: the field 'bias'"),
        (vision_cfg(act_kwargs={"approximate": "gauss"}, head_width=8), "act_kwargs"),
        (vision_cfg(rope=True), "vision_cfg: the field 'rope'"),
        (model(embed_dim=512), "model_cfg: embed_dim is 512, and the weights have 24"),
        (model(multimodal_cfg={}), r"model_cfg: multimodal_cfg is \{\} \(a decoder of captions, CoCa\)"),
        (top(model_cfg=None, other=1), "the field 'other'"),
    ],
)
def test_an_open_clip_config_is_read_or_refused(edit, message, folder, families):
    with pytest.raises(InputError, match=message) as error:
        open_donor(folder("open_clip_f16", edit), families)
    assert "\n" not in str(error.value) and "open_clip_config.json" in str(error.value)


def test_what_bare_weights_do_not_tell_is_a_guess_that_is_said(goldens, families, tmp_path):
    shutil.copy(goldens / "open_clip_f16" / "open_clip_model.safetensors", tmp_path / "bare.safetensors")
    with pytest.warns(
        Remark, match=r"bare\.safetensors: activation = gelu is a guess: .* \(convert with --set activation="
    ):
        donor = open_donor(tmp_path / "bare.safetensors", families, image_heads=4, text_heads=2)
    assert [guess.name for guess in donor.guesses] == ["activation", "text_pool"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Remark)
        donor = open_donor(
            tmp_path / "bare.safetensors",
            families,
            activation="quick_gelu",
            image_heads=4,
            text_heads=2,
            text_pool="eot",
        )
    assert donor.guesses == () and donor.cfg == open_donor(goldens / "open_clip_f16", families).cfg


def bare_clip(width, joint=8):
    """The tensors of a CLIP of one layer a tower as open_clip names them, of zeros. width: of the image tower."""
    shapes = {"token_embedding.weight": (49408, 64), "positional_embedding": (77, 64), "text_projection": (64, joint)}
    shapes |= {"visual.conv1.weight": (width, 3, 4, 4), "visual.positional_embedding": (5, width)}
    shapes |= {"visual.class_embedding": (width,), "visual.proj": (width, joint), "logit_scale": ()}
    norms = {"ln_final": 64, "visual.ln_pre": width, "visual.ln_post": width}
    for tower, size in (("", 64), ("visual.", width)):
        block = f"{tower}transformer.resblocks.0."
        norms |= {f"{block}ln_1": size, f"{block}ln_2": size}
        layers = {"attn.in_proj_": 3 * size, "attn.out_proj.": size, "mlp.c_fc.": 8, "mlp.c_proj.": size}
        for name, out in layers.items():
            shapes |= {f"{block}{name}weight": (out, 8 if "c_proj" in name else size), f"{block}{name}bias": (out,)}
    shapes |= {f"{norm}.{part}": (size,) for norm, size in norms.items() for part in ("weight", "bias")}
    return {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}


@pytest.mark.parametrize(("width", "heads"), [(1280, 16), (1408, 16), (1664, 16), (1792, 16), (768, 12), (896, 14)])
def test_heads_of_a_bare_file_are_those_of_the_published_width(width, heads, families, tmp_path):
    """ViT-H, g, bigG and e have heads of 80, 88, 104 and 112 in the image tower."""
    from safetensors.numpy import save_file

    save_file(bare_clip(width), tmp_path / "a.safetensors")
    donor = open_donor(tmp_path / "a.safetensors", families)
    assert (donor.cfg.image.heads, donor.cfg.text.heads) == (heads, 1)
    (why,) = [guess.why for guess in donor.guesses if guess.name == "image_heads"]
    of = "" if width in (768, 896) else f" of width {width}"
    assert why == f"heads of {width // heads}, as in published models{of}"


def test_pooling_and_mask_of_a_bare_file_are_said_set_or_refused(families, tmp_path):
    from safetensors.numpy import save_file

    file, clip = tmp_path / "a.safetensors", bare_clip(64)
    save_file(clip, file)
    with pytest.warns(Remark, match="text_pool = eot is a guess: .* text_mask is causal too, and image_pool cls"):
        open_donor(file, families)
    cfg = open_donor(file, families, text_pool="last", text_mask="none", image_pool="mean_norm").cfg
    assert (cfg.text.pool, cfg.text.causal, cfg.image.pool) == ("last", False, "mean_norm")
    with pytest.raises(InputError, match="text_mask is 'no': write one of causal, none"):
        open_donor(file, families, text_mask="no")
    clipa = {name: value for name, value in clip.items() if "ln_pre" not in name}
    worldwide = clip | {"token_embedding.weight": np.zeros((49409, 64), np.float16)}
    for tensors, what in ((clipa, r"no norm before .* \(CLIPA, say\)"), (worldwide, "a vocabulary of 49,409 tokens")):
        save_file(tensors, file)
        with pytest.raises(InputError, match=f"it has {what}.*, and only open_clip_config.json says how it pools"):
            open_donor(file, families)
    save_file(clip | {"text.cls_emb": np.zeros(64, np.float16)}, file)
    with pytest.raises(InputError, match="this is open_clip's CoCa, which also decodes captions; only CLIPs"):
        open_donor(file, families)


def test_one_tower_is_named(goldens, families, tmp_path):
    from safetensors.numpy import save_file

    from heirloom.common.checkpoint.weights import open_safetensors

    tensors = open_safetensors(goldens / "hf_gelu" / "model.safetensors")
    for tower, message in (("vision_model.", "an image tower alone"), ("text_model.", "a text tower alone")):
        save_file({k: v.copy() for k, v in tensors.items() if k.startswith(tower)}, tmp_path / f"{tower}safetensors")
        with pytest.raises(InputError, match=f"{message} .*take the whole model, CLIPModel"):
            open_donor(tmp_path / f"{tower}safetensors", families)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("text_model.embeddings.word_embeddings.weight", r"a CLIP around a BERT \(Chinese-CLIP, say\)"),
        ("text_model.roberta.embeddings.word_embeddings.weight", "an AltCLIP"),
        ("text_decoder.bert.embeddings.word_embeddings.weight", "a BLIP"),
        ("text_encoder.encoder.layer.0.attention.self.query.weight", "a BLIP"),
    ],
)
def test_a_whole_model_with_another_text_tower_is_not_one_tower(text, name, goldens, families, tmp_path):
    from safetensors.numpy import save_file

    from heirloom.common.checkpoint.weights import open_safetensors

    tensors = open_safetensors(goldens / "hf_gelu" / "model.safetensors")
    whole = {key: value.copy() for key, value in tensors.items() if key.startswith("vision_model.")}
    save_file(whole | {text: np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "of another"}')
    for asked in (families, [LEARNGENE, *families]):
        with pytest.raises(InputError, match=f"{name}, whose text tower is not read"):
            open_donor(tmp_path, asked)


def nested(goldens, file, *prefixes):
    """The tensors of a bare file of open_clip, once under each prefix."""
    from safetensors.numpy import save_file

    from heirloom.common.checkpoint.weights import open_safetensors

    tensors = open_safetensors(goldens / "open_clip_f16" / "open_clip_model.safetensors")
    save_file({prefix + key: value.copy() for prefix in prefixes for key, value in tensors.items()}, file)
    return file


@pytest.mark.parametrize("prefix", ["clip_model.", "clip.", "model.backbone.", "task.model.module."])
def test_an_attribute_that_all_names_begin_with_is_removed_and_said(prefix, goldens, families, tmp_path):
    file = nested(goldens, tmp_path / "a.safetensors", prefix)
    heads = dict(activation="quick_gelu", image_heads=4, text_heads=2)
    with pytest.warns(Remark, match="removed from "):
        donor = open_donor(file, families, **heads)
    assert donor.cfg == open_donor(goldens / "open_clip_f16", families).cfg


def test_of_two_whole_models_neither_is_taken(goldens, families, tmp_path):
    file = nested(goldens, tmp_path / "a.safetensors", "student.", "teacher.")
    with pytest.raises(InputError, match=r"under 'student\.' \(tinyclip\) and under 'teacher\.' \(tinyclip\); save"):
        open_donor(file, families)


def test_adapters_inside_a_model_are_named(goldens, families, tmp_path):
    """The state_dict of a PeftModel, and one into which PEFT injected its layers."""
    from safetensors.numpy import save_file

    from heirloom.common.checkpoint.weights import open_safetensors

    tensors = {k: v.copy() for k, v in open_safetensors(goldens / "hf_gelu" / "model.safetensors").items()}
    shutil.copy(goldens / "hf_gelu" / "config.json", tmp_path)
    name = next(key for key in tensors if key.endswith("q_proj.weight")).removesuffix(".weight")
    weight = tensors.pop(f"{name}.weight")
    tensors |= {f"{name}.base_layer.weight": weight, f"{name}.lora_A.default.weight": weight[:2].copy()}
    for prefix in ("", "base_model.model."):
        save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=r"model\.safetensors: holds the matrices of an adapter, LoRA: merge them"):
            open_donor(tmp_path, families)


@pytest.mark.parametrize("value", [0, -4, "x", 1.5, True, "4,4"])
def test_heads_that_are_set_are_a_number(value, plain):
    for name in ("image_heads", "text_heads"):
        with pytest.raises(InputError, match=f"{name} is {value!r}: write a whole number of 1 or more"):
            plain("hf_gelu").override(**{name: value})

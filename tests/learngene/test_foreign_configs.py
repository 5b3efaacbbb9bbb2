"""Fields of foreign configs that change what a ViT computes without changing a shape: read, or refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.vit.model import VitConfig
from heirloom.common.vit.timm_architectures import CLASSES, arguments, settings, table
from learngene.zoo import FAMILY


@pytest.fixture
def folder(golden, tmp_path):
    """`folder(name, **fields)`: a golden's copy with these fields in config.json; those of model_args are merged."""

    def make(name, **fields):
        copy = Path(shutil.copytree(golden[0] / name, tmp_path / f"{len(list(tmp_path.iterdir()))}" / name))
        config = json.loads((copy / "config.json").read_text())
        fields = {key: config[key] | value if key == "model_args" else value for key, value in fields.items()}
        (copy / "config.json").write_text(json.dumps(config | fields))
        return copy

    return make


@pytest.fixture
def read(folder):
    return lambda name, **fields: open_donor(folder(name, **fields), [FAMILY]).cfg


def args(**fields):
    return dict(model_args=fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(model_type="vit_msn"),
            r"model_type is 'vit_msn', a masked siamese network \(ViT-MSN\): of transformers' ViTs, only vit, deit",
        ),
        (dict(model_type="vit_mae"), r"architectures is .*only models where it is \['ViTMAEModel'\]"),
        (dict(model_type="yolos"), "model_type is 'yolos', a YOLOS, which detects objects: of"),
        (
            dict(model_type="vitt"),
            "model_type is 'vitt': of transformers' ViTs, only vit, deit, .*, siglip_vision_model can be read$",
        ),
        (dict(model_type="deit", architectures=None), "tensor 'deit.embeddings.distillation_token' is missing"),
        (dict(model_type="dinov2"), "model_type is 'dinov2', and the tensors are not: take the config.json of these"),
        (
            dict(architectures=["ViTModel"]),
            r"architectures is \['ViTModel'\] \(not the class that has these tensors\)",
        ),
        (dict(architectures=["ViTForMaskedImageModeling"]), r"architectures is \['ViTForMaskedImageModeling'\]"),
        (dict(architectures=["DeiTForImageClassificationWithTeacher"]), "architectures is .*ViTForImageClassification"),
        (dict(architectures="ViTForImageClassification"), "architectures is 'ViTForImageClassification'"),
        (dict(architectures=[7]), r"architectures is \[7\]"),
        (dict(layer_norm_eps=0), "eps is 0: choose a number between 0 and 1"),
        (dict(num_labels=4), "num_labels is 4, and the weights have 5"),
        (dict(num_labels="5"), "num_labels is '5', and must be a whole number"),
        (dict(model_type=None), "model_type is None"),
        (dict(qkv_bias=False), "qkv_bias is False, and the weights have True"),
        (dict(image_size=[8, 16]), r"image_size is \[8, 16\]; only squares can be read"),
        (dict(hidden_act="relu"), "hidden_act is 'relu'; only 'gelu_python', 'gelu', "),
        (dict(layer_norm_eps="1e-12"), "layer_norm_eps is '1e-12', and must be a number"),
        (dict(num_attention_heads=0), "num_attention_heads is 0, and must be from 1"),
        (dict(num_attention_heads=3), "3 heads do not divide a width of 16"),
        (dict(num_hidden_layers=1), "encoder.layer.1"),
        (dict(use_mask_token=True), "the field 'use_mask_token'"),
        (dict(quantization_config={"bits": 4}), "the field 'quantization_config'"),
        (dict(pruned_heads={"0": [1]}), "pruned_heads is"),
    ],
)
def test_a_hugging_face_config_is_read_or_refused(fields, message, folder):
    with pytest.raises(InputError, match=message) as error:
        open_donor(folder("hf_vit", **fields), [FAMILY])
    assert "\n" not in str(error.value)


def test_hugging_face_settings_that_shapes_cannot_tell(read):
    plain = read("hf_vit")
    assert read("hf_vit", hidden_act="gelu_new", layer_norm_eps=1e-6) == replace(
        plain, activation="gelu_tanh", eps=1e-6
    )
    assert read("hf_vit", num_attention_heads=4, image_size=[8, 8], pooler_act="relu", encoder_stride=32) == replace(
        plain, heads=4
    )
    assert read("hf_vit", interpolate_pos_encoding=True, architectures=None, num_labels=5) == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(architecture="resnet50"), "no architecture 'resnet50'.* write the differences into model_args"),
        (dict(architecture="vit_tiny_patch16_225"), "did you mean 'vit_tiny_patch16_224'"),
        (
            dict(architecture="beit_base_patch16_224"),
            "timm builds 'beit_base_patch16_224' as its class Beit, which has relative positions",
        ),
        (dict(architecture="vit_small_patch16_dinov3"), "as its class Eva, which has rotary positions; only its"),
        (dict(architecture="vit_relpos_small_patch16_224"), "class VisionTransformerRelPos, which has relative posit"),
        (dict(architecture="vit_base_patch16_xp_224"), r"block_fn is 'ParallelScalingBlock' \(other blocks\)"),
        (dict(architecture="vit_dwee_patch16_reg1_gap_256"), r"attn_layer is 'diff' \(another attention\)"),
        (args(no_embed_class=True), "no_embed_class is True, and the weights have False"),
        (args(global_pool="map"), "tensor 'attn_pool.kv.bias' is missing"),
        (args(global_pool="map", fc_norm=True), r"fc_norm is True \(a norm of the pooled features alone\)"),
        (args(reg_tokens=4), "reg_tokens is 4, and the weights have 0"),
        (args(pre_norm=True), "pre_norm is True, and the weights have False"),
        (args(scale_mlp_norm=True), "scale_mlp_norm is True, and the weights have False"),
        (
            dict(architecture="vit_small_r26_s32_224"),
            r"embed_layer is 'HybridEmbed' \(a stem that is not one convolution\)",
        ),
        (
            dict(architecture="deit_tiny_distilled_patch16_224"),
            "img_size 8 x 8 with patches of 4 and 2 tokens in front needs 6 positions, and the weights have 5",
        ),
        (args(act_layer="relu"), "act_layer is 'relu'"),
        (args(norm_layer="rmsnorm"), "norm_layer is 'rmsnorm'; only models where it is 'layernorm'"),
        (
            args(norm_layer="layernorm eps=1e-3"),
            "norm_layer is 'layernorm eps=1e-3'; only models where it is 'layernorm'",
        ),
        (args(norm_layer="layernorm eps=x"), "norm_layer is 'layernorm eps=x'"),
        (args(norm_layer=1e-3), "norm_layer is 0.001, and must be a string"),
        (
            args(**{"class": "VisionTransformerDistilled"}),
            "class is 'VisionTransformerDistilled', which timm builds no VisionTransformer",
        ),
        (args(block_fn="Block"), "block_fn is 'Block', which timm builds no VisionTransformer with; remove it"),
        (args(attn_layer="Attention"), "attn_layer is 'Attention'"),
        (args(drop_rate={"rate": 0}), "'drop_rate' is of type dict; only numbers, texts and lists"),
        (
            dict(pretrained_cfg={"label_offset": 1}),
            r"pretrained_cfg: label_offset is 1 \(logits in front of those of the classes\)",
        ),
        (args(img_size=[8, 16]), r"img_size is \[8, 16\], and the weights have 8"),
        (args(img_size=12), "img_size is 12, and the weights have 8"),
        (args(img_size=9, dynamic_img_pad=True), "patches of 4 px do not fill pictures of 9 x 9 px"),
        (args(patch_size=[4, 2]), r"patch_size is \[4, 2\]; only squares"),
        (args(fc_norm=True), r"fc_norm is True \(a norm of the class token alone\)"),
        (args(global_pool="max"), "global_pool is 'max'"),
        (args(class_token=False), "builds no VisionTransformer with class_token False"),
        (args(init_values=1e-5), "init_values is 1e-05, and the weights have 0.0"),
        (args(qk_norm=True), "qk_norm is True, and the weights have False"),
        (args(qkv_bias=False), "qkv_bias is False, and the weights have True"),
        (args(proj_bias=False), "projections without biases"),
        (args(final_norm=False), "final_norm is False, and the weights have True"),
        (args(pos_embed="none"), "positions that are not learned"),
        (args(num_heads="2"), "num_heads is '2', and must be a whole number"),
        (args(mlp_ratio=3), "mlp_ratio times embed_dim is 48, and the weights have 32"),
        (args(depth=3), "depth is 3, and the weights have 2"),
        (args(num_classes=7), "num_classes is 7, and the weights have 5"),
        (args(rope=True), "the field 'rope'"),
        (dict(num_classes=4), "num_classes is 4, and the weights have 5"),
        (dict(num_features=17), "num_features is 17, and the weights have 16"),
        (dict(global_pool="avg"), "global_pool is 'avg' .*only models where it is 'token'"),
        (
            dict(pretrained_cfg={"input_size": [3, 8, 16], "fixed_input_size": True}, **args(img_size=None)),
            r"img_size is \[8, 16\]",
        ),
        (dict(pretrained_cfg={"patch": 4}), "pretrained_cfg: the field 'patch'"),
        (dict(model_type="vit"), "model_type is 'vit'"),
        (dict(head_bias=True), "the field 'head_bias'"),
    ],
)
def test_a_timm_config_is_read_or_refused(fields, message, folder):
    with pytest.raises(InputError, match=message) as error:
        open_donor(folder("timm_cls", **fields), [FAMILY])
    assert "\n" not in str(error.value)


def test_timm_settings_that_shapes_cannot_tell(read):
    plain = read("timm_cls")
    assert (plain.activation, plain.eps, plain.pool) == ("gelu", 1e-6, "cls")
    assert read("timm_cls", **args(act_layer="gelu_tanh", num_heads=4)) == replace(
        plain, activation="gelu_tanh", heads=4
    )
    assert read("timm_cls", **args(global_pool="avg", fc_norm=False)) == replace(plain, pool="norm_mean")
    # This name's function sets an eps of 1e-5; what else it sets is overridden.
    clip = dict(architecture="vit_base_patch16_clip_224", **args(pre_norm=False))
    assert read("timm_cls", **clip) == replace(plain, eps=1e-5)
    # timm leaves the name's own in place of None
    implied = args(num_heads=None, class_token=None, global_pool=None, fc_norm=None)
    gap = read("timm_norm_mean", architecture="vit_base_patch16_gap_224", **implied)
    assert gap == replace(plain, heads=16, tokens="none", pool="norm_mean")
    harmless = args(
        drop_path_rate=0.1, proj_drop_rate=0.1, weight_init="jax", dynamic_img_pad=True, init_values=None, reg_tokens=0
    )
    assert read("timm_cls", **harmless, model_type="timm_wrapper", do_pooling=True, torch_dtype="float32") == plain
    assert read("timm_cls", **args(dynamic_img_size=True)) == replace(plain, any_size=True)
    assert read("timm_cls", **args(img_size=[4, 16])) == replace(plain, size=4, size_width=16)
    # of other sizes it would pad those that patches do not fill
    assert read("timm_cls", **args(dynamic_img_size=True, dynamic_img_pad=True)) == plain
    assert read("timm_cls", **args(img_size=9)) == replace(plain, size=9)  # the last row of pixels is not read


def test_a_name_implies_its_arguments():
    """Published models by name alone, as their shapes and timm's functions have them."""
    base = VitConfig(patch=16, width=768, heads=1, hidden=3072, tokens="cls", pool="cls")
    assert settings(arguments("vit_base_patch16_224", {}, "here"), base) == replace(base, heads=12)
    patches = replace(base, patch=32, size=256, tokens="none", pool="norm_mean")
    gap = settings(arguments("vit_base_patch32_siglip_gap_256", {}, "here"), patches)
    assert (gap.activation, gap.pool, gap.tokens) == ("gelu_tanh", "norm_mean", "none")
    two = replace(base, tokens="cls+dist", pool="cls+dist")
    distilled = settings(arguments("deit_base_distilled_patch16_224", {}, "here"), two)
    assert (distilled.tokens, distilled.pool) == ("cls+dist", "cls+dist")
    assert {entry["class"] for entry in table().values()} > set(CLASSES) and len(table()) == 278


def test_a_conversion_says_each_guess_once_and_names_no_folder_that_goes_again(golden, folder_of, tmp_path, capsys):
    pytest.importorskip("torch")  # a file of torch is written
    shutil.copy(golden[0] / "timm_cls" / "model.safetensors", tmp_path / "vit.safetensors")
    assert main(["convert", str(tmp_path / "vit.safetensors"), str(tmp_path / "ours"), "--set", "heads=2"]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "timm"), "--to", "timm"]) == 0
    said = "".join(capsys.readouterr())
    assert [said.count(f"{name} = ") for name in ("activation", "eps", "size", "pool")] == [
        1
    ] * 4 and ".partial" not in said
    wide = VitConfig(size=8, patch=4, width=192, layers=1, heads=3, hidden=32, classes=5, tokens="cls", pool="cls")
    # read again, everything is a guess
    assert main(["convert", str(folder_of(wide, "wide")), str(tmp_path / "deit"), "--to", "deit"]) == 0
    said = "".join(capsys.readouterr())
    assert "is a guess" not in said and ".partial" not in said


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("blocks.0.attn.relative_position_bias_table", "has relative positions"),
        ("rope.periods", "has rotary positions"),
        ("blocks.0.mlp.fc1_g.weight", "has a gated MLP with a tensor of its own for the gate"),
        ("pre_logits.fc.weight", r"has a layer before the head \(pre_logits\)"),
        ("blocks.1.attn.lambda_q1", "has differential attention"),
        ("head.2.weight", r"a head of several layers \(head\.2\.weight\): .*; leave head\.\* out to get the backbone"),
    ],
)
def test_parts_of_other_vits_are_named(golden, tmp_path, key, message):
    tensors = {k: v.copy() for k, v in open_safetensors(golden[0] / "timm_cls" / "model.safetensors").items()}
    save_file(tensors | {key: np.zeros(16, np.float32)}, tmp_path / "vit.safetensors")
    with pytest.raises(InputError, match=message):
        open_donor(tmp_path / "vit.safetensors", [FAMILY], heads=2)


def test_pictures_that_are_no_square_are_refused(golden, tmp_path):
    tensors = {k: v.copy() for k, v in open_safetensors(golden[0] / "timm_cls" / "model.safetensors").items()}
    save_file(tensors | {"pos_embed": np.zeros((1, 8, 16), np.float32)}, tmp_path / "vit.safetensors")
    with pytest.raises(InputError, match="8 positions, which are not a square of patches and 1 tokens in front"):
        open_donor(tmp_path / "vit.safetensors", [FAMILY], heads=2)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("encoder.layer.0.norm1.weight", "a Hugging Face ViT needs its config.json next to the weights"),
        ("vision_model.encoder.layers.0.layer_norm1.weight", "a Hugging Face ViT needs its config.json"),
        ("beit.embeddings.cls_token", "a BEiT of transformers"),
        ("ijepa.embeddings.position_embeddings", "an I-JEPA of transformers, which has no class token"),
        ("encoder.layer.0.layernorm_before.weight", "a Hugging Face ViT needs its config.json next to the weights"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "a ViT of torchvision"),
        ("layer.0.attention.q_proj.weight", "a DINOv3 of transformers, which has rotary positions"),
        ("swin.encoder.layers.0.blocks.0.layernorm_before.weight", "a Swin of transformers, with windows"),
    ],
)
def test_lookalikes_are_named(tmp_path, key, message):
    save_file({key: np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        open_donor(tmp_path, [FAMILY])

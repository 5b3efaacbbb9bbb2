"""Read and write the config.json of transformers' ViT and DeiT."""

import re
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.family import Found, Read
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.weights import write_json
from heirloom.common.errors import InputError
from heirloom.common.nn.mlp import HF_ACTIVATIONS, HF_NAMES
from learngene.bare_files import ordinary, plain
from learngene.vit import VitConfig

_BLOCKS = re.compile(r"(.*\.)?encoder\.layer\.0\.layernorm_before\.weight")
# Other models of transformers whose blocks have the same names.
_OTHERS = {
    "audio-spectrogram-transformer": "an Audio Spectrogram Transformer (AST)",
    "beit": "a BEiT, which has LayerScale and relative positions",
    "data2vec-vision": "a Data2Vec, which has LayerScale and relative positions",
    "dpt": "a DPT, which estimates depth or segments",
    "ijepa": "an I-JEPA, which has no class token",
    "videomae": "a VideoMAE, which reads videos",
    "vit_hybrid": "a hybrid ViT, which has a convolutional stem",
    "vit_mae": "a masked autoencoder (ViT-MAE)",
    "vit_msn": "a masked siamese network (ViT-MSN)",
    "vivit": "a ViViT, which reads videos",
    "yolos": "a YOLOS, which detects objects",
}


def read(found: Found) -> Read | None:
    """Read the config of ViTForImageClassification, DeiTForImageClassification or its variant with two heads."""
    if not any(_BLOCKS.fullmatch(key) for key in found.tensors):
        return None
    fields = found.json("config.json")
    kind = _model_type(fields) if fields else None
    model = next((m for m in ("vit", "deit") if f"{m}.embeddings.cls_token" in found.tensors), None)
    if model is None:
        return None
    if fields is None:
        raise InputError("a Hugging Face ViT needs its config.json next to the weights; there is none")
    if kind != model:
        given = f"model_type is {kind!r}, and the tensors are those of {model!r}"
        raise InputError(f"{fields.where}: {given}: take the file of these weights")
    two = "distillation_classifier.weight" in found.tensors
    fields.fixed("architectures", [_class(model, two)], [], None, feature="not the classifier that has these tensors")
    fields.transformers()
    fields.skip("interpolate_pos_encoding")  # for pictures of other sizes
    # Of masked modelling, and of a pooler that no classifier uses.
    fields.skip("encoder_stride", "pooler_output_size", "pooler_act")
    fields.fixed("qkv_bias", True, feature="queries, keys and values without biases")
    cfg: dict[str, Any] = dict(
        size=fields.square("image_size", 224),
        channels=fields.integer("num_channels", 3),
        patch=fields.square("patch_size", 16),
        width=fields.integer("hidden_size", 768),
        layers=fields.integer("num_hidden_layers", 12),
        heads=fields.integer("num_attention_heads", 12),
        hidden=fields.integer("intermediate_size", 3072),
        activation=fields.choice("hidden_act", HF_ACTIVATIONS, "gelu"),
        eps=fields.number("layer_norm_eps", 1e-12),
    )
    fields.done()
    head = "cls_classifier.weight" if two else "classifier.weight"
    if head not in found.tensors:
        raise InputError("has no classifier: only ViTs that classify are read (ViTForImageClassification)")
    classes = len(found.tensors[head])
    if (labels := fields.integer("num_labels", None, least=0)) is not None:
        fields.agree("num_labels", labels, classes)
    tokens: Any = dict(tokens="cls+dist" if model == "deit" else "cls", pool="cls+dist" if two else "cls")
    return Read(VitConfig(**cfg, classes=classes, **tokens))


def _model_type(fields: Fields) -> str:
    """Read the model type, `vit` or `deit`. Raises InputError that names another model."""
    kind = fields.text("model_type")
    if kind not in ("vit", "deit"):
        what = f", {_OTHERS[kind]}" if kind in _OTHERS else ""
        only = "of transformers, only classifiers of ViT and DeiT can be read"
        raise InputError(f"{fields.where}: model_type is {kind!r}{what}: {only}")
    return kind


def _class(model: str, two_heads: bool) -> str:
    """Name of the classifier's class in transformers."""
    name = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}[model]
    return name + ("WithTeacher" if two_heads else "")


def write(cfg: VitConfig, folder: Path) -> None:
    ordinary(cfg, "hf")
    plain(cfg, "transformers' ViT")
    if cfg.pool not in ("cls", "cls+dist"):
        raise InputError(
            "transformers' ViT puts a class token in front and classifies it, this model averages patches: no file of"
            " it computes the same. Write --to timm, which transformers reads through its timm wrapper, or train with"
            " tokens 'cls' and pool 'cls'"
        )
    model = "deit" if cfg.tokens == "cls+dist" else "vit"
    sizes: dict[str, Any] = dict(image_size=cfg.size, num_channels=cfg.channels, patch_size=cfg.patch)
    sizes |= dict(hidden_size=cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads)
    sizes |= dict(intermediate_size=cfg.hidden, qkv_bias=True)
    sizes |= dict(hidden_act=HF_NAMES[cfg.activation], layer_norm_eps=cfg.eps)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = {str(i): f"LABEL_{i}" for i in range(cfg.classes)}
    labelled = dict(id2label=labels, label2id={name: int(i) for i, name in labels.items()})
    about = dict(architectures=[_class(model, cfg.pool == "cls+dist")], model_type=model)
    write_json(folder / "config.json", about | sizes | labelled)

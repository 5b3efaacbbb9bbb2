"""Folders of transformers' ViT and DeiT: config.json, both ways."""

from pathlib import Path
from typing import Any

from common.checkpoint.convert import Found, Read
from common.checkpoint.weights import write_json
from common.errors import InputError
from learngene.bare_files import ordinary
from learngene.vit import VitConfig

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def read(found: Found) -> Read | None:
    """The config of ViTForImageClassification, DeiTForImageClassification or its variant with two heads."""
    model = next((m for m in ("vit", "deit") if f"{m}.embeddings.cls_token" in found.tensors), None)
    if model is None:
        return None
    fields = found.json("config.json")
    if fields is None:
        raise InputError("a Hugging Face ViT needs its config.json next to the weights; there is none")
    fields.choice("model_type", {model: model})
    fields.transformers()
    fields.skip("encoder_stride", "pooler_output_size", "pooler_act")  # of masked modelling, and of a pooler that no classifier uses
    fields.fixed("qkv_bias", True, feature="queries, keys and values without biases")
    cfg = dict(
        size=fields.square("image_size", 224),
        channels=fields.integer("num_channels", 3),
        patch=fields.square("patch_size", 16),
        width=fields.integer("hidden_size", 768),
        layers=fields.integer("num_hidden_layers", 12),
        heads=fields.integer("num_attention_heads", 12),
        hidden=fields.integer("intermediate_size", 3072),
        activation=fields.choice("hidden_act", _ACTIVATIONS, "gelu"),
        eps=fields.number("layer_norm_eps", 1e-12),
    )
    fields.done()
    two = "distillation_classifier.weight" in found.tensors
    head = "cls_classifier.weight" if two else "classifier.weight"
    if head not in found.tensors:
        raise InputError("has no classifier: only ViTs that classify are read (ViTForImageClassification)")
    tokens: Any = dict(tokens="cls+dist" if model == "deit" else "cls", pool="cls+dist" if two else "cls")
    return Read(VitConfig(**cfg, classes=len(found.tensors[head]), **tokens))


def write(cfg: VitConfig, folder: Path) -> None:
    ordinary(cfg, "hf")
    if cfg.pool not in ("cls", "cls+dist"):
        raise InputError(
            "transformers' ViT puts a class token in front and classifies it, this model averages patches: no file of it computes the "
            "same. Write --to timm, which transformers reads through its timm wrapper, or train with tokens 'cls' and pool 'cls'"
        )
    names = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    model = "deit" if cfg.tokens == "cls+dist" else "vit"
    kind = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}[model]
    kind += "WithTeacher" if cfg.pool == "cls+dist" else ""
    sizes: dict[str, Any] = dict(image_size=cfg.size, num_channels=cfg.channels, patch_size=cfg.patch, hidden_size=cfg.width)
    sizes |= dict(num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, intermediate_size=cfg.hidden, qkv_bias=True)
    sizes |= dict(hidden_act=names[cfg.activation], layer_norm_eps=cfg.eps, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = {str(i): f"LABEL_{i}" for i in range(cfg.classes)}
    labelled = dict(id2label=labels, label2id={name: int(i) for i, name in labels.items()})
    write_json(folder / "config.json", dict(architectures=[kind], model_type=model) | sizes | labelled)

"""Read and write the configs of transformers: CLIP (torch and Flax), MetaCLIP 2 and SigLIP."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.family import Found, Read
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.flax_files import as_torch
from heirloom.common.errors import InputError
from heirloom.common.files import write_json
from heirloom.common.nn.mlp import HF_ACTIVATIONS, HF_NAMES
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.resnet import ResNetConfig
from tinyclip_jax.shapes import plain, unusual
from tinyclip_jax.vit import VitImageConfig

# transformers' defaults, which its configs leave out.
_BLOCKS: dict[str, Any] = dict(num_hidden_layers=12, hidden_act="quick_gelu", layer_norm_eps=1e-5)
_TEXT = _BLOCKS | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
_TEXT |= dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
_IMAGE = _BLOCKS | dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
_IMAGE |= dict(image_size=224, patch_size=32)
_SIGLIP: dict[str, Any] = dict(num_hidden_layers=12, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
_SIGLIP |= dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
_SIGLIP_TEXT = _SIGLIP | dict(vocab_size=32000, max_position_embeddings=64)
_SIGLIP_IMAGE = _SIGLIP | dict(image_size=224, patch_size=16)
_LEGACY_EOS = 2  # old configs of CLIP carry this id, and transformers then pools at the largest one
# The tower of timm's options that is SigLIP's.
_MAP = dict(tokens="none", pool="map", projection="none")


def read(found: Found) -> Read | None:
    """Read a folder of transformers; None for another format. Raises InputError for a model that is none of these."""
    if "text_model.embeddings.token_embedding.weight" not in found.tensors:
        return None
    whole = {"vision_model.embeddings.class_embedding", "vision_model.embeddings.patch_embedding.weight"}
    siglip = "vision_model.head.probe" in found.tensors
    if not (siglip or whole <= found.tensors.keys()):
        return None
    fields = found.json("config.json")
    if fields is None:
        raise InputError("a Hugging Face CLIP needs its config.json next to the weights; there is none")
    naflex = "pictures given as any number of patches, NaFlex"
    fields.fixed("model_type", *(("siglip",) if siglip else ("clip", "metaclip_2")), feature=naflex if siglip else "")
    # Scale and bias are tensors of the file.
    fields.skip("logit_scale_init_value", "return_loss", "initializer_factor")
    fields.transformers()
    return Read(_read_siglip(fields) if siglip else _read_clip(fields))


def read_flax(found: Found) -> Read | None:
    """Read the config of FlaxCLIPModel, which is that of CLIPModel."""
    if "vision_model/embeddings/class_embedding" not in found.tensors:
        return None
    return read(replace(found, tensors=as_torch(found.tensors)))


def _read_clip(fields: Fields) -> ClipConfig:
    kind = fields.text("model_type", "clip")
    text, image = (_tower(fields, name, kind, defaults) for name, defaults in (("text", _TEXT), ("vision", _IMAGE)))
    vocab, eos = text.integer("vocab_size"), text.integer("eos_token_id", least=0)
    largest = kind == "clip" and eos in (_LEGACY_EOS, vocab - 1)
    cfg = ClipConfig(
        ImageConfig(size=image.square("image_size"), patch=image.square("patch_size"), **_sizes(image)),
        TextConfig(
            context=text.integer("max_position_embeddings"),
            vocab=vocab,
            eot=None if largest else eos,
            **_sizes(text),
        ),
        joint=fields.integer("projection_dim", 512),
    )
    _done(fields, text, image)
    return cfg


def _read_siglip(fields: Fields) -> ClipConfig:
    towers = (("text", _SIGLIP_TEXT), ("vision", _SIGLIP_IMAGE))
    text, image = (_tower(fields, name, "siglip", defaults) for name, defaults in towers)
    text.skip("eos_token_id")  # the last position is pooled, whatever is there
    image.fixed("vision_use_head", True)
    size = image.square("image_size")
    tower = VitImageConfig(size=size, patch=image.square("patch_size"), **_sizes(image), **_MAP)  # type: ignore[arg-type]
    context, vocab = text.integer("max_position_embeddings"), text.integer("vocab_size")
    reads: dict[str, Any] = dict(pool="last", causal=False, projection="affine")
    cfg = TextConfig(context=context, vocab=vocab, **reads, **_sizes(text))
    joint = text.integer("projection_size", cfg.width) or cfg.width
    _done(fields, text, image)
    return ClipConfig(tower, cfg, joint=joint, logit_bias=True)


def _done(fields: Fields, text: Fields, image: Fields) -> None:
    image.fixed("num_channels", 3)
    for tower in (text, image, fields):
        tower.done()


def _tower(fields: Fields, name: str, kind: str, defaults: Mapping[str, Any]) -> Fields:
    """Return the config of one tower: as in transformers, `*_config_dict` with its defaults wins over `*_config`."""
    tower, old = fields.value(f"{name}_config"), fields.value(f"{name}_config_dict")
    where = f"{fields.where}: {name}_config"
    for part in (tower, old):
        if not isinstance(part, Mapping | None):
            raise InputError(f"{where} is {part!r}, not an object")
    merged = Fields({**defaults, **(tower or {}), **({} if old is None else {**defaults, **old})}, where)
    merged.fixed("model_type", f"{kind}_{name}_model")
    merged.skip("projection_dim")  # the model's own counts
    merged.transformers()
    return merged


def _sizes(tower: Fields) -> dict[str, Any]:
    return dict(
        width=tower.integer("hidden_size"),
        layers=tower.integer("num_hidden_layers"),
        heads=tower.integer("num_attention_heads"),
        hidden=tower.integer("intermediate_size"),
        activation=tower.choice("hidden_act", HF_ACTIVATIONS, near=False),
        eps=tower.number("layer_norm_eps"),
    )


def write(cfg: ClipConfig, folder: Path) -> None:
    """Write the config.json of SigLIP for timm's ViT as image tower, of MetaCLIP 2 for its end token, else of CLIP.

    Raises InputError for what neither can express.
    """
    if isinstance(cfg.image, ResNetConfig):
        needed = "which Hugging Face's CLIP does not have: write this model as open_clip or original"
        raise InputError(f"the image tower is a ResNet, {needed}")
    if not (plain(cfg.image) and plain(cfg.text)):
        needed = "Hugging Face's CLIP has equal layers whose heads fill the width"
        raise InputError(f"this model is pruned, and {needed}: write it as original")
    image, text = _written(cfg.image), _written(cfg.text)
    image |= dict(image_size=cfg.image.size, patch_size=cfg.image.patch, num_channels=3)
    text |= dict(vocab_size=cfg.text.vocab, max_position_embeddings=cfg.text.context)
    if isinstance(cfg.image, VitImageConfig):
        _check_siglip(cfg)
        image |= dict(model_type="siglip_vision_model")
        text |= dict(model_type="siglip_text_model", projection_size=cfg.joint)
        head: dict[str, Any] = dict(architectures=["SiglipModel"], model_type="siglip")
    else:
        if option := unusual(cfg):
            raise InputError(f"{option}, which Hugging Face's CLIP does not have: write this model as open_clip")
        last, eot = cfg.text.vocab - 1, cfg.text.eot
        # With 2, CLIP's class pools at the largest id, as we do without an end token: it may be below the last one.
        text |= dict(eos_token_id=_LEGACY_EOS if eot is None else eot, pad_token_id=last if eot is None else eot)
        text |= dict(bos_token_id=last - 1)
        # MetaCLIP 2's class takes 2 for the end token, as XLM-R's is.
        name, kind = ("MetaClip2Model", "metaclip_2") if eot == _LEGACY_EOS else ("CLIPModel", "clip")
        text |= dict(projection_dim=cfg.joint, model_type=f"{kind}_text_model")
        image |= dict(projection_dim=cfg.joint, model_type=f"{kind}_vision_model")
        head = dict(architectures=[name], model_type=kind, projection_dim=cfg.joint)
        head |= dict(logit_scale_init_value=2.6592)
    write_json(folder / "config.json", head | dict(text_config=text, vision_config=image))


def write_flax(cfg: ClipConfig, folder: Path) -> None:
    """Write the config.json of FlaxCLIPModel. Raises InputError for what it cannot express."""
    if isinstance(cfg.image, VitImageConfig):
        what = "the image tower is timm's ViT, and transformers had no Flax SigLIP"
        raise InputError(f"{what}: write this model as hf or open_clip, or keep the heirloom format")
    if cfg.text.eot == _LEGACY_EOS:
        what = f"the end token is {_LEGACY_EOS}, where transformers' Flax CLIP pools at the largest id"
        raise InputError(f"{what}: write this model as hf or open_clip, or keep the heirloom format")
    write(cfg, folder)


def _written(c: ImageConfig | TextConfig | VitImageConfig) -> dict[str, Any]:
    sizes = dict(hidden_size=c.width, intermediate_size=c.hidden)
    sizes |= dict(num_hidden_layers=c.layers, num_attention_heads=c.heads)
    return sizes | dict(hidden_act=HF_NAMES[c.activation], layer_norm_eps=c.eps, attention_dropout=0.0)


def _check_siglip(cfg: ClipConfig) -> None:
    """Raises InputError when transformers' SigLIP does not have a setting of this model."""
    assert isinstance(cfg.image, VitImageConfig)
    given = {f"image.{name}": getattr(cfg.image, name) for name in _MAP} | {"logit_bias": cfg.logit_bias}
    given |= {f"text.{name}": getattr(cfg.text, name) for name in ("pool", "causal", "projection", "layer_scale")}
    given |= {f"image.{name}": value for name, value in cfg.image.options.items()}
    needed: dict[str, Any] = {f"image.{name}": value for name, value in _MAP.items()} | {"logit_bias": True}
    needed |= {"text.pool": "last", "text.causal": False, "text.projection": "affine", "text.layer_scale": 0.0}
    for name, value in given.items():
        if name not in needed or value != needed[name]:
            what = f"{name} is {value!r}, which Hugging Face's SigLIP does not have"
            raise InputError(f"{what}: write this model as open_clip, or keep the heirloom format")

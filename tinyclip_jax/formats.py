"""Configurations of other CLIPs, both ways: Hugging Face, open_clip, and bare files whose shapes tell it."""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint.convert import Format
from common.checkpoint.weights import Tensors, read_json, write_json
from common.errors import InputError
from tinyclip_jax import layouts
from tinyclip_jax.masks import per_layer
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig, head_dim, uniform
from tinyclip_jax.resnet import STAGES, ResNetConfig

# transformers' defaults, which its configs leave out.
_HF_TEXT: dict[str, Any] = dict(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=49408, max_position_embeddings=77
) | dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49407)
_HF_IMAGE: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32
) | dict(hidden_act="quick_gelu", layer_norm_eps=1e-5)
_HF_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
HEAD = 64  # channels of a head in every published model
_LEGACY_EOS = 2  # old configs carry this id, and transformers then pools at the largest one


def config(saved: Mapping[str, Any]) -> ClipConfig:
    """The config of a weights folder of ours."""

    def tower(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    try:
        image = ResNetConfig if "blocks" in saved["image"] else ImageConfig
        return ClipConfig(**{**saved, "image": image(**tower(saved["image"])), "text": TextConfig(**tower(saved["text"]))})
    except (TypeError, KeyError) as error:
        raise InputError(f"config.json is not of this version of tinyclip: {error}") from error


def _read_hf(tensors: Tensors, folder: Path) -> ClipConfig | None:
    if "vision_model.embeddings.class_embedding" not in tensors or "text_model.embeddings.token_embedding.weight" not in tensors:
        return None
    if not (folder / "config.json").is_file():
        raise InputError("a Hugging Face CLIP needs its config.json beside the weights; there is none")
    theirs = read_json(folder / "config.json")
    text = _HF_TEXT | (theirs.get("text_config") or {}) | (theirs.get("text_config_dict") or {})
    image = _HF_IMAGE | (theirs.get("vision_config") or {}) | (theirs.get("vision_config_dict") or {})
    eos = text["eos_token_id"]
    return ClipConfig(
        ImageConfig(
            size=image["image_size"],
            patch=image["patch_size"],
            width=image["hidden_size"],
            layers=image["num_hidden_layers"],
            heads=image["num_attention_heads"],
            hidden=image["intermediate_size"],
            activation=_hf_activation(image["hidden_act"]),
            eps=image["layer_norm_eps"],
        ),
        TextConfig(
            context=text["max_position_embeddings"],
            vocab=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            hidden=text["intermediate_size"],
            activation=_hf_activation(text["hidden_act"]),
            eps=text["layer_norm_eps"],
            eot=None if eos in (_LEGACY_EOS, text["vocab_size"] - 1) else eos,
        ),
        joint=theirs.get("projection_dim", 512),
    )


def _hf_activation(name: str) -> Any:
    if name not in _HF_ACTIVATIONS:
        raise InputError(f"config.json: activation {name!r} is not one of {', '.join(_HF_ACTIVATIONS)}")
    return _HF_ACTIVATIONS[name]


def _write_hf(cfg: ClipConfig, folder: Path) -> None:
    names = {ours: theirs for theirs, ours in _HF_ACTIVATIONS.items()}
    if isinstance(cfg.image, ResNetConfig):
        raise InputError("Hugging Face's CLIP has no ResNet; write this model as open_clip or original")
    if not (_plain(cfg.image) and _plain(cfg.text)):
        raise InputError("Hugging Face's CLIP has the same heads in every layer and they fill the width; write a pruned model as original")

    def tower(c: ImageConfig | TextConfig) -> dict[str, Any]:
        sizes = dict(hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads)
        return sizes | dict(hidden_act=names[c.activation], layer_norm_eps=c.eps, attention_dropout=0.0, projection_dim=cfg.joint)

    eos = cfg.text.vocab - 1 if cfg.text.eot is None else cfg.text.eot
    text = tower(cfg.text) | dict(model_type="clip_text_model", vocab_size=cfg.text.vocab, max_position_embeddings=cfg.text.context)
    text |= dict(bos_token_id=cfg.text.vocab - 2, eos_token_id=eos, pad_token_id=eos)
    image = tower(cfg.image) | dict(model_type="clip_vision_model", image_size=cfg.image.size, patch_size=cfg.image.patch, num_channels=3)
    head = dict(architectures=["CLIPModel"], model_type="clip", projection_dim=cfg.joint, logit_scale_init_value=2.6592)
    write_json(folder / "config.json", head | dict(text_config=text, vision_config=image))


def _read_open_clip(tensors: Tensors, folder: Path) -> ClipConfig | None:
    if "visual.conv1.weight" not in tensors or "token_embedding.weight" not in tensors:
        return None
    cfg = infer(tensors, "visual.", "")
    file = folder / "open_clip_config.json"
    if not file.is_file():
        return cfg.override(activation="quick_gelu") if "input_resolution" in tensors else cfg  # OpenAI's archives carry it
    theirs = read_json(file).get("model_cfg", {})
    image = theirs.get("vision_cfg", {})
    if isinstance(cfg.image, ImageConfig) and _plain(cfg.image):
        cfg = cfg.override(image_heads=cfg.image.width // image.get("head_width", 64))
    if _plain(cfg.text):
        cfg = cfg.override(text_heads=theirs.get("text_cfg", {}).get("heads", cfg.text.heads))
    return cfg.override(activation="quick_gelu") if theirs.get("quick_gelu") else cfg


def _write_open_clip(cfg: ClipConfig, folder: Path) -> None:
    image, text = cfg.image, cfg.text
    activation = text.activation
    if image.eps != 1e-5 or text.eps != 1e-5 or activation == "gelu_tanh" or getattr(image, "activation", activation) != activation:
        raise InputError("open_clip's layout has one activation (gelu or quick_gelu) for both towers and eps 1e-5; this model differs")
    if text.eot not in (None, text.vocab - 1):
        raise InputError("open_clip's classic layout pools at the largest token; this model pools at another")
    vision_cfg: dict[str, Any] = dict(image_size=image.size, width=image.width)
    if isinstance(image, ResNetConfig):
        vision_cfg |= dict(layers=image.blocks, heads=image.heads)
    else:
        vision_cfg |= dict(layers=image.layers, patch_size=image.patch)
    text_cfg: dict[str, Any] = dict(
        context_length=text.context, vocab_size=text.vocab, width=text.width, heads=text.heads, layers=text.layers
    )
    for theirs, c in ((vision_cfg, image), (text_cfg, text)):
        if isinstance(c, ResNetConfig):
            continue
        # The library builds layers that are alike; of pruned ones the sizes are told, and the names of tensors are its own.
        ratio = dict(mlp_ratio=c.hidden / c.width) if isinstance(c.hidden, int) else dict(hidden=c.hidden)
        theirs |= ratio | (dict(head_width=head_dim(c)) if theirs is vision_cfg or not _plain(c) else {})
        theirs |= {} if _plain(c) else dict(heads=c.heads)
    model = dict(embed_dim=cfg.joint, quick_gelu=activation == "quick_gelu", vision_cfg=vision_cfg, text_cfg=text_cfg)
    write_json(folder / "open_clip_config.json", dict(model_cfg=model))


def _read_original(tensors: Tensors, folder: Path) -> ClipConfig | None:
    if "_image_encoder.visual.conv1.weight" not in tensors:
        return None
    return infer(tensors, "_image_encoder.visual.", "_text_encoder.")


def infer(tensors: Tensors, image: str, text: str) -> ClipConfig:
    """The config that the shapes of open_clip's tensors imply; heads are of 64, activations exact GELU.

    Layers of automatic models differ: heads from in_proj, hidden units from c_fc, none where these are absent.
    """
    try:
        vocab, text_width = tensors[f"{text}token_embedding.weight"].shape
        context, joint = len(tensors[f"{text}positional_embedding"]), tensors[f"{text}text_projection"].shape[1]
        text_tower = TextConfig(context=context, vocab=vocab, **_blocks(tensors, f"{text}transformer.resblocks.", text_width))
        if f"{image}layer1.0.conv1.weight" in tensors:
            return ClipConfig(_infer_resnet(tensors, image), text_tower, joint=joint)
        width, _, patch, _ = tensors[f"{image}conv1.weight"].shape
        joint = tensors[f"{image}proj"].shape[1]
        grid = isqrt(len(tensors[f"{image}positional_embedding"]) - 1)
        image_tower = ImageConfig(size=grid * patch, patch=patch, **_blocks(tensors, f"{image}transformer.resblocks.", width))
    except KeyError as error:
        raise InputError(f"tensor {error} is missing: this is not a whole CLIP with ViT and text towers") from error
    except (ValueError, IndexError) as error:  # names without the number of a layer, tensors with other axes
        raise InputError(f"its tensors are not those of a CLIP with ViT and text towers ({error})") from error
    return ClipConfig(image_tower, text_tower, joint=joint)


def _infer_resnet(tensors: Tensors, prefix: str) -> ResNetConfig:
    """Heads are of 64; the side of the input follows from the positions that are pooled."""
    width = len(tensors[f"{prefix}layer1.0.conv1.weight"])
    blocks = tuple(sum(f"{prefix}layer{stage}.{i}.conv1.weight" in tensors for i in range(100)) for stage in STAGES)
    grid = isqrt(len(tensors[f"{prefix}attnpool.positional_embedding"]) - 1)
    return ResNetConfig(size=32 * grid, width=width, blocks=blocks, heads=max(1, 32 * width // HEAD))


def _blocks(tensors: Tensors, prefix: str, width: int) -> dict[str, Any]:
    """Width, layers, heads and hidden units of one tower."""
    layers = 1 + max((int(key.removeprefix(prefix).split(".")[0]) for key in tensors if key.startswith(prefix)), default=-1)
    if not layers:
        raise InputError(f"tensor '{prefix}0.*' is missing: this is not a whole CLIP with ViT and text towers")

    def rows(name: str) -> tuple[int, ...]:
        return tuple(len(tensors.get(f"{prefix}{i}.{name}", ())) for i in range(layers))

    packed, hidden = rows("attn.in_proj_weight"), rows("mlp.c_fc.weight")
    sizes: dict[str, Any] = dict(width=width, layers=layers, hidden=uniform(hidden))
    if set(packed) == {3 * width}:
        return sizes | dict(heads=width // HEAD)
    return sizes | dict(heads=uniform(tuple(n // (3 * HEAD) for n in packed)), head_dim=HEAD)


def _complete(cfg: ClipConfig, tensors: Tensors, image: str, text: str) -> Tensors:
    """Of a layer without heads the released files hold no attention at all: a norm that nothing reads, and no constant to add."""
    tensors = {key: value for key, value in tensors.items() if value.size}
    for prefix, c in ((image, cfg.image), (text, cfg.text)):
        if isinstance(c, ResNetConfig):
            continue
        for i, heads in enumerate(per_layer(c.heads, c.layers)):
            for name in ("ln_1.weight", "ln_1.bias", "attn.out_proj.bias"):
                key = f"{prefix}transformer.resblocks.{i}.{name}"
                if not heads and key not in tensors:
                    tensors[key] = np.zeros(c.width, next(iter(tensors.values())).dtype)
    return tensors


def _plain(c: ImageConfig | TextConfig) -> bool:
    """Whether all layers are alike and their heads fill the width."""
    return isinstance(c.heads, int) and isinstance(c.hidden, int) and (c.head_dim is None or c.heads * c.head_dim == c.width)


def _clean_original(key: str) -> str:
    """Take off what data parallelism and the automatic method wrapped around the keys."""
    key = re.sub(r"(?<![^.])module\.", "", key)  # a whole part of the key: `l0_module.` keeps its name
    return re.sub(r"^_?(image|text)_encoder_without_ddp\.", r"_\1_encoder.", key)


def _nothing(cfg: ClipConfig, folder: Path) -> None:
    """The original files carry no config: shapes tell it."""
    image_head = cfg.image.embed // cfg.image.heads if isinstance(cfg.image, ResNetConfig) else head_dim(cfg.image)
    if image_head != HEAD or head_dim(cfg.text) != HEAD:
        raise InputError("the original layout knows heads of 64 only; this model has others")


FORMATS = (
    Format("hf", layouts.HF, "model.safetensors", _read_hf, _write_hf),
    Format(
        "open_clip",
        layouts.OPEN_CLIP,
        "open_clip_model.safetensors",
        _read_open_clip,
        _write_open_clip,
        clean=lambda key: key.removeprefix("module."),
        complete=lambda cfg, tensors: _complete(cfg, tensors, "visual.", ""),
    ),
    Format(
        "original",
        layouts.ORIGINAL,
        "tinyclip.pt",
        _read_original,
        _nothing,
        clean=_clean_original,
        complete=lambda cfg, tensors: _complete(cfg, tensors, "_image_encoder.visual.", "_text_encoder."),
    ),
)

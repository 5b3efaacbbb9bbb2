"""Read and write the configs of foreign CLIPs: Hugging Face, open_clip, and bare files (read from their shapes)."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from heirloom.common.checkpoint.family import Format, Found, Guess, Lookalike, Read
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.weights import Tensors, write_json
from heirloom.common.errors import InputError
from heirloom.common.nn.mlp import HF_ACTIVATIONS, HF_NAMES, Activation
from tinyclip_jax import layouts
from tinyclip_jax.masks import per_layer
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig, head_dim, uniform
from tinyclip_jax.resnet import STAGES, ResNetConfig

Tower = TypeVar("Tower", ImageConfig, TextConfig)

# transformers' defaults, which its configs leave out.
_HF_BLOCKS: dict[str, Any] = dict(num_hidden_layers=12, hidden_act="quick_gelu", layer_norm_eps=1e-5)
_HF_TEXT = _HF_BLOCKS | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
_HF_TEXT |= dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
_HF_IMAGE = _HF_BLOCKS | dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
_HF_IMAGE |= dict(image_size=224, patch_size=32)
HEAD = 64  # channels of a head in every published model
_LEGACY_EOS = 2  # old configs carry this id, and transformers then pools at the largest one
# open_clip's switches of other blocks and poolings; `block_type` names them all.
_CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


def _read_hf(found: Found) -> Read | None:
    needed = {"vision_model.embeddings.class_embedding", "text_model.embeddings.token_embedding.weight"}
    if not needed <= found.tensors.keys():
        return None
    fields = found.json("config.json")
    if fields is None:
        raise InputError("a Hugging Face CLIP needs its config.json next to the weights; there is none")
    fields.fixed("model_type", "clip")
    fields.skip("logit_scale_init_value", "return_loss")  # the scale is a tensor of the file
    fields.transformers()
    text, image = (_hf_tower(fields, name, defaults) for name, defaults in (("text", _HF_TEXT), ("vision", _HF_IMAGE)))
    vocab, eos = text.integer("vocab_size"), text.integer("eos_token_id", least=0)
    eot, context = None if eos in (_LEGACY_EOS, vocab - 1) else eos, text.integer("max_position_embeddings")
    cfg = ClipConfig(
        ImageConfig(size=image.square("image_size"), patch=image.square("patch_size"), **_hf_sizes(image)),
        TextConfig(context=context, vocab=vocab, eot=eot, **_hf_sizes(text)),
        joint=fields.integer("projection_dim", 512),
    )
    image.fixed("num_channels", 3)
    for tower in (text, image, fields):
        tower.done()
    return Read(cfg)


def _hf_tower(fields: Fields, name: str, defaults: Mapping[str, Any]) -> Fields:
    """Return the config of one tower: as in transformers, `*_config_dict` with its defaults wins over `*_config`."""
    tower, old = fields.value(f"{name}_config"), fields.value(f"{name}_config_dict")
    where = f"{fields.where}: {name}_config"
    for part in (tower, old):
        if not isinstance(part, Mapping | None):
            raise InputError(f"{where} is {part!r}, not an object")
    merged = Fields({**defaults, **(tower or {}), **({} if old is None else {**defaults, **old})}, where)
    merged.fixed("model_type", f"clip_{name}_model")
    merged.skip("projection_dim")  # the model's own counts
    merged.transformers()
    return merged


def _hf_sizes(tower: Fields) -> dict[str, Any]:
    return dict(
        width=tower.integer("hidden_size"),
        layers=tower.integer("num_hidden_layers"),
        heads=tower.integer("num_attention_heads"),
        hidden=tower.integer("intermediate_size"),
        activation=tower.choice("hidden_act", HF_ACTIVATIONS),
        eps=tower.number("layer_norm_eps"),
    )


def _write_hf(cfg: ClipConfig, folder: Path) -> None:
    if isinstance(cfg.image, ResNetConfig):
        needed = "which Hugging Face's CLIP does not have: write this model as open_clip or original"
        raise InputError(f"the image tower is a ResNet, {needed}")
    if not (_plain(cfg.image) and _plain(cfg.text)):
        needed = "Hugging Face's CLIP has equal layers whose heads fill the width"
        raise InputError(f"this model is pruned, and {needed}: write it as original")

    def tower(c: ImageConfig | TextConfig, model_type: str) -> dict[str, Any]:
        sizes = dict(hidden_size=c.width, intermediate_size=c.hidden)
        sizes |= dict(num_hidden_layers=c.layers, num_attention_heads=c.heads)
        rest = dict(hidden_act=HF_NAMES[c.activation], layer_norm_eps=c.eps, attention_dropout=0.0)
        return sizes | rest | dict(projection_dim=cfg.joint, model_type=model_type)

    eos = cfg.text.vocab - 1 if cfg.text.eot is None else cfg.text.eot
    text = tower(cfg.text, "clip_text_model")
    text |= dict(vocab_size=cfg.text.vocab, max_position_embeddings=cfg.text.context)
    text |= dict(bos_token_id=cfg.text.vocab - 2, eos_token_id=eos, pad_token_id=eos)
    image = tower(cfg.image, "clip_vision_model")
    image |= dict(image_size=cfg.image.size, patch_size=cfg.image.patch, num_channels=3)
    head = dict(architectures=["CLIPModel"], model_type="clip", projection_dim=cfg.joint, logit_scale_init_value=2.6592)
    write_json(folder / "config.json", head | dict(text_config=text, vision_config=image))


def _read_open_clip(found: Found) -> Read | None:
    if "visual.conv1.weight" not in found.tensors or "token_embedding.weight" not in found.tensors:
        return None
    cfg, file = infer(found.tensors, "visual.", ""), found.json("open_clip_config.json")
    if file is not None:
        file.skip("preprocess_cfg", "tokenizer_cfg", "version", "license*", "_*")  # preprocessing is read elsewhere
        model = file.object("model_cfg")
        file.done()
        return Read(_open_clip_config(cfg, model))
    if "input_resolution" in found.tensors:  # of OpenAI's archives, whose models all have QuickGELU and heads of 64
        return Read(cfg.override(activation="quick_gelu"))
    return Read(cfg, _bare(cfg, "models fine-tuned from OpenAI's have quick_gelu"))


def _bare(cfg: ClipConfig, otherwise: str) -> tuple[Guess, ...]:
    """Return the settings of a CLIP that its weights do not contain."""
    guesses = [Guess("activation", cfg.text.activation, f"the weights do not contain it, and {otherwise}")]
    for name, c in (("image_heads", cfg.image), ("text_heads", cfg.text)):
        if isinstance(c.heads, int):
            guesses.append(Guess(name, c.heads, f"heads of {HEAD}, as in published models"))
    return tuple(guesses)


def _open_clip_config(cfg: ClipConfig, model: Fields) -> ClipConfig:
    """Complete `cfg`, inferred from shapes, with open_clip's `model_cfg`; every field of it is read or refused."""
    image, text = model.object("vision_cfg"), model.object("text_cfg")
    activation: Activation = "quick_gelu" if model.boolean("quick_gelu", False) else "gelu"
    model.skip("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
    model.skip("cast_dtype", "output_dict", "custom_text")
    model.agree("embed_dim", model.integer("embed_dim", cfg.joint), cfg.joint)
    for tower in (image, text):
        tower.skip("output_tokens", "patch_dropout", "hf_tokenizer_name", "tokenizer_*", "pad_id")
        tower.skip("timm_*" if tower is image else "hf_*")
        tower.fixed("ls_init_value", None)
        tower.fixed("block_type", None, "default")
        for name in _CUSTOM:
            tower.fixed(name, False)
    image.fixed("timm_model_name", None, "")
    text.fixed("hf_model_name", None, "")
    head_width = image.integer("head_width", HEAD)
    if isinstance(cfg.image, ResNetConfig):
        image.agree("layers", image.integers("layers"), cfg.image.blocks)
        cfg = replace(cfg, image=replace(cfg.image, heads=cfg.image.embed // head_width))
        image.skip("mlp_ratio", "patch_size")
    else:
        image.agree("patch_size", image.square("patch_size", 16), cfg.image.patch)
        cfg = replace(cfg, image=_open_clip_tower(cfg.image, image, activation, cfg.image.width // head_width))
        _open_clip_image_pool(image)
    image.agree("width", image.integer("width", 768 if isinstance(cfg.image, ImageConfig) else 64), cfg.image.width)
    image.agree("image_size", image.square("image_size", 224), cfg.image.size)
    heads = text.integer("heads", 8) if _plain(cfg.text) else 0
    cfg = replace(cfg, text=_open_clip_text(_open_clip_tower(cfg.text, text, activation, heads), text))
    for fields in (image, text, model):
        fields.done()
    return cfg


def _open_clip_tower(c: Tower, fields: Fields, activation: Activation, heads: int) -> Tower:
    """Complete one tower with the heads, activation and eps of its config."""
    acts, norms = fields.object("act_kwargs"), fields.object("norm_kwargs")
    if activation == "gelu":
        activation = acts.choice("approximate", {"none": "gelu", "tanh": "gelu_tanh"}, "none")
    c = replace(c, activation=activation, eps=norms.number("eps", c.eps))
    acts.done()
    norms.done()
    if _plain(c):
        fields.agree("layers", fields.integer("layers", 12), c.layers)
        ratio = fields.number("mlp_ratio", 4.0)
        if int(ratio * c.width) != c.hidden:
            sizes = f"{c.hidden} hidden units at width {c.width}: take the config of these weights"
            raise InputError(f"{fields.where}: mlp_ratio is {ratio:g}, and the weights have {sizes}")
        return replace(c, heads=heads)
    fields.skip("layers", "heads", "hidden", "head_width", "mlp_ratio")  # sizes of pruned layers, which the shapes give
    return c


def _open_clip_image_pool(image: Fields) -> None:
    """Only the class token is read. A norm after the pooling is the same as before it where one token is picked."""
    image.fixed("attentional_pool", False)
    image.fixed("no_ln_pre", False)
    image.fixed("pool_type", "tok")
    image.boolean("final_ln_after_pool", False)
    image.fixed("pos_embed_type", "learnable", "sin_cos_2d")  # either is a tensor of the file
    image.skip("attn_pooler_*")


def _open_clip_text(c: TextConfig, text: Fields) -> TextConfig:
    text.fixed("no_causal_mask", False)
    text.fixed("embed_cls", False)
    text.fixed("proj_bias", False)
    text.fixed("proj_type", "linear")
    text.boolean("final_ln_after_pool", False)
    text.agree("width", text.integer("width", 512), c.width)
    text.agree("context_length", text.integer("context_length", 77), c.context)
    text.agree("vocab_size", text.integer("vocab_size", 49408), c.vocab)
    eos = text.integer("eos_id", 2, least=0)
    pool = text.choice("pool_type", {"argmax": None, "eos": eos}, "argmax")
    return replace(c, eot=pool)


def _write_open_clip(cfg: ClipConfig, folder: Path) -> None:
    image, text = cfg.image, cfg.text
    activation = text.activation
    one_activation = activation != "gelu_tanh" and getattr(image, "activation", activation) == activation
    if not one_activation or {image.eps, text.eps} != {1e-5}:
        needed = "one activation (gelu or quick_gelu) for both towers and eps 1e-5"
        raise InputError(f"open_clip's layout has {needed}; this model differs")
    if text.eot not in (None, text.vocab - 1):
        raise InputError("open_clip's classic layout pools at the largest token; this model pools at another")
    vision_cfg: dict[str, Any] = dict(image_size=image.size, width=image.width)
    if isinstance(image, ResNetConfig):
        vision_cfg |= dict(layers=list(image.blocks), head_width=image.embed // image.heads)
    else:
        vision_cfg |= dict(layers=image.layers, patch_size=image.patch)
    text_cfg: dict[str, Any] = dict(context_length=text.context, vocab_size=text.vocab)
    text_cfg |= dict(width=text.width, heads=text.heads, layers=text.layers)
    for theirs, c in ((vision_cfg, image), (text_cfg, text)):
        if isinstance(c, ResNetConfig):
            continue
        # open_clip builds equal layers only; pruned ones get their sizes too, and the tensors have open_clip's names.
        ratio = dict(mlp_ratio=c.hidden / c.width) if isinstance(c.hidden, int) else dict(hidden=c.hidden)
        theirs |= ratio | (dict(head_width=head_dim(c)) if theirs is vision_cfg or not _plain(c) else {})
        theirs |= {} if _plain(c) else dict(heads=c.heads)
    model = dict(embed_dim=cfg.joint, quick_gelu=activation == "quick_gelu", vision_cfg=vision_cfg, text_cfg=text_cfg)
    write_json(folder / "open_clip_config.json", dict(model_cfg=model))


def _read_original(found: Found) -> Read | None:
    if "_image_encoder.visual.conv1.weight" not in found.tensors:
        return None
    cfg = infer(found.tensors, "_image_encoder.visual.", "_text_encoder.")
    return Read(cfg, _bare(cfg, "the published TinyCLIPs have gelu")[:1])


def infer(tensors: Tensors, image: str, text: str) -> ClipConfig:
    """Infer the config from the shapes of open_clip's tensors; heads have 64 channels, activations are exact GELU.

    Layers of automatically pruned models differ: heads follow from in_proj, hidden units from c_fc, and are 0 where
    these are absent.
    """
    try:
        vocab, text_width = tensors[f"{text}token_embedding.weight"].shape
        context, joint = len(tensors[f"{text}positional_embedding"]), tensors[f"{text}text_projection"].shape[1]
        blocks = _blocks(tensors, f"{text}transformer.resblocks.", text_width)
        text_tower = TextConfig(context=context, vocab=vocab, **blocks)
        if f"{image}layer1.0.conv1.weight" in tensors:
            return ClipConfig(_infer_resnet(tensors, image), text_tower, joint=joint)
        width, _, patch, _ = tensors[f"{image}conv1.weight"].shape
        joint = tensors[f"{image}proj"].shape[1]
        grid = isqrt(len(tensors[f"{image}positional_embedding"]) - 1)
        blocks = _blocks(tensors, f"{image}transformer.resblocks.", width)
        image_tower = ImageConfig(size=grid * patch, patch=patch, **blocks)
    except KeyError as error:
        raise InputError(f"tensor {error} is missing: this is not a whole CLIP with ViT and text towers") from error
    except (ValueError, IndexError) as error:  # names without a layer number, tensors with other axes
        raise InputError(f"its tensors are not those of a CLIP with ViT and text towers ({error})") from error
    return ClipConfig(image_tower, text_tower, joint=joint)


def _infer_resnet(tensors: Tensors, prefix: str) -> ResNetConfig:
    """Infer the ResNet: heads have 64 channels, the input size follows from the number of pooled positions."""
    width = len(tensors[f"{prefix}layer1.0.conv1.weight"])
    blocks = tuple(sum(f"{prefix}layer{stage}.{i}.conv1.weight" in tensors for i in range(100)) for stage in STAGES)
    grid = isqrt(len(tensors[f"{prefix}attnpool.positional_embedding"]) - 1)
    return ResNetConfig(size=32 * grid, width=width, blocks=blocks, heads=max(1, 32 * width // HEAD))


def _blocks(tensors: Tensors, prefix: str, width: int) -> dict[str, Any]:
    """Infer width, layers, heads and hidden units of one tower."""
    numbers = (int(key.removeprefix(prefix).split(".")[0]) for key in tensors if key.startswith(prefix))
    layers = 1 + max(numbers, default=-1)
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
    """Add zeros for the norm and output bias that released files leave out of layers without heads."""
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
    """Whether all layers have the same sizes and their heads fill the width."""
    if not (isinstance(c.heads, int) and isinstance(c.hidden, int)):
        return False
    return c.head_dim is None or c.heads * c.head_dim == c.width


def _clean_original(key: str) -> str:
    """Remove the prefix that the automatic method added to the keys."""
    return re.sub(r"^_?(image|text)_encoder_without_ddp\.", r"_\1_encoder.", key)


def _write_nothing(cfg: ClipConfig, folder: Path) -> None:
    """Write no config: shapes give that of an original file. Raises InputError for heads not of 64 channels."""
    image_head = cfg.image.embed // cfg.image.heads if isinstance(cfg.image, ResNetConfig) else head_dim(cfg.image)
    if image_head != HEAD or head_dim(cfg.text) != HEAD:
        needed = f"the original layout needs {HEAD}: write this model as open_clip or heirloom"
        raise InputError(f"heads have {image_head} and {head_dim(cfg.text)} channels, {needed}")


_with_visual = partial(Format, complete=partial(_complete, image="visual.", text=""))
_with_towers = partial(Format, complete=partial(_complete, image="_image_encoder.visual.", text="_text_encoder."))
FORMATS = (
    Format("hf", layouts.HF, "model.safetensors", _read_hf, _write_hf),
    _with_visual("open_clip", layouts.OPEN_CLIP, "open_clip_model.safetensors", _read_open_clip, _write_open_clip),
    _with_towers("original", layouts.ORIGINAL, "tinyclip.pt", _read_original, _write_nothing, _clean_original),
)

_WHOLE = "take the whole model, CLIPModel"
_MERGE = "an adapter, not a model: merge it into its base"
LOOKALIKES = (
    Lookalike("text_model.embeddings.token_embedding.weight", f"a text tower alone (CLIPTextModel): {_WHOLE}"),
    Lookalike("vision_model.embeddings.class_embedding", f"an image tower alone (CLIPVisionModel): {_WHOLE}"),
    Lookalike("visual.trunk.*", "an open_clip model around a tower of timm: only its own ViTs and ResNets are read"),
    Lookalike("text.transformer.*", "an open_clip model with a custom text tower: only its classic CLIPs are read"),
    Lookalike("clip.vision_model.*", "a model built around a CLIP (CLIPSeg, say): take the CLIP it was built from"),
    Lookalike("*.lora_A*", f"{_MERGE} (peft's merge_and_unload), save and convert that"),
    Lookalike("*lora_down*", f"{_MERGE}, save and convert that"),
)

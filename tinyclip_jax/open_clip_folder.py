"""Read and write the config of open_clip: its CLIP, its CustomTextCLIP, and image towers of timm."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from heirloom.common.checkpoint.family import Found, Guess, Read
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.errors import InputError
from heirloom.common.files import write_json
from heirloom.common.nn.mlp import Activation
from heirloom.common.vit.shapes import HEADS
from heirloom.common.vit.timm_architectures import CLASSES, arguments, ratio_of, settings, table
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig, TextPool, head_dim
from tinyclip_jax.resnet import ResNetConfig
from tinyclip_jax.shapes import HEAD, infer, plain
from tinyclip_jax.vit import VitImageConfig

CONFIG = "open_clip_config.json"
CLIP_VOCAB = 49408
Tower = TypeVar("Tower", ImageConfig, TextConfig)

# open_clip's switches of other blocks and poolings; `block_type` names them all.
_CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
# Fields of its own ViT, which open_clip does not look at where timm builds the tower.
_OWN: tuple[str, ...] = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "ls_init_value")
_OWN += ("attentional_pool", "attn_pooler_*", "no_ln_pre", "pos_embed_type", "final_ln_after_pool", "pool_type")
_OWN += ("act_kwargs", "norm_kwargs", "block_type")
_RESIZED = "open_clip resizes the positions when it loads them; write the size of the weights here"
_TIMM_POOLS = {name: name for name in ("", "avg", "token", "map")}


def clean(key: str) -> str:
    """Name a tensor of a CustomTextCLIP as in a CLIP."""
    return key.removeprefix("text.")


def read(found: Found) -> Read | None:
    """Read a folder or file of open_clip; None for another format."""
    tensors = found.tensors
    trunk = any(key.startswith("visual.trunk.") for key in tensors)
    if "token_embedding.weight" not in tensors or not (trunk or "visual.conv1.weight" in tensors):
        return None
    file = found.json(CONFIG)
    if file is None and trunk:
        raise InputError(f"the image tower is a timm model; its name is in {CONFIG}: put this file next to the weights")
    if file is None and "cls_emb" in tensors:
        raise InputError("this is open_clip's CoCa, which also decodes captions; only CLIPs are supported: use one")
    if file is not None:
        file.skip("preprocess_cfg", "tokenizer_cfg", "version", "license*", "_*")  # preprocessing is read elsewhere
        if "model_cfg" not in file:
            needed = "put open_clip's config of the model (with vision_cfg and text_cfg) under this key"
            raise InputError(f"{file.where}: has no 'model_cfg': {needed}")
        model = file.object("model_cfg")
        file.done()
        _refuse_others(model)
        return Read(_config(infer(tensors, "visual.", ""), model))
    cfg = infer(tensors, "visual.", "")
    if "input_resolution" in tensors:  # of OpenAI's archives, whose models all have QuickGELU and heads of 64
        return Read(cfg.override(activation="quick_gelu"))
    _refuse_unlike_openai(cfg)
    if isinstance(cfg.image, ImageConfig) and plain(cfg.image):
        cfg = cfg.override(image_heads=HEADS.get(cfg.image.width))
    pooling = "the weights do not contain it; as in OpenAI's CLIPs, text_mask is causal too, and image_pool cls"
    guesses = bare(cfg, "models fine-tuned from OpenAI's have quick_gelu")
    return Read(cfg, (*guesses, Guess("text_pool", cfg.text.pool, pooling)))


def _refuse_unlike_openai(cfg: ClipConfig) -> None:
    """Raises InputError for what OpenAI's CLIPs do not have, whose pooling and mask are not theirs either."""
    what = f"a vocabulary of {cfg.text.vocab:,} tokens (MetaCLIP 2, say)" if cfg.text.vocab > CLIP_VOCAB else ""
    if isinstance(cfg.image, ImageConfig) and not cfg.image.pre_norm:
        what = "no norm before the blocks of its image tower (CLIPA, say)"
    if what:
        raise InputError(f"it has {what}, and only {CONFIG} says how it pools and masks: put it next to the weights")


def bare(cfg: ClipConfig, otherwise: str) -> tuple[Guess, ...]:
    """Return the settings of a CLIP that its weights do not contain."""
    guesses = [Guess("activation", cfg.text.activation, f"the weights do not contain it, and {otherwise}")]
    for name, c in (("image_heads", cfg.image), ("text_heads", cfg.text)):
        if isinstance(c.heads, int):
            size = HEAD
            if isinstance(c, ImageConfig) and c.head_dim is None and c.heads == HEADS.get(c.width):
                size = c.width // c.heads
            of = f" of width {c.width}" if size != HEAD else ""
            guesses.append(Guess(name, c.heads, f"heads of {size}, as in published models{of}"))
    return tuple(guesses)


def _refuse_others(model: Fields) -> None:
    """Raises InputError for towers that are not here, before their tensors are looked at."""
    model.fixed("multimodal_cfg", None, feature="a decoder of captions, CoCa")
    image, text = model.object("vision_cfg"), model.object("text_cfg")
    text.fixed("hf_model_name", None, "", feature="a text tower of transformers")
    name = _architecture(image)
    if name and name not in table():
        raise image.refusal("timm_model_name", "of timm only its VisionTransformer is read as image tower")
    if name:
        arguments(name, {}, image.where)


def _architecture(image: Fields) -> str:
    """Return timm's name of the image tower, without the tag of its weights (vit_tiny_patch16_224.augreg_in21k)."""
    return (image.text("timm_model_name", None) or "").partition(".")[0]


def _config(cfg: ClipConfig, model: Fields) -> ClipConfig:
    """Complete `cfg`, inferred from shapes, with open_clip's `model_cfg`; every field of it is read or refused."""
    image, text = model.object("vision_cfg"), model.object("text_cfg")
    activation: Activation = "quick_gelu" if model.boolean("quick_gelu", False) else "gelu"
    model.skip("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
    model.skip("cast_dtype", "output_dict", "custom_text", "multimodal_cfg")
    model.agree("embed_dim", model.integer("embed_dim", cfg.joint), cfg.joint)
    for tower in (image, text):
        tower.skip("output_tokens", "patch_dropout", "tokenizer_mode", "pad_id")
        for name in _CUSTOM:
            tower.fixed(name, False)
    cleaning = text.object("tokenizer_kwargs")
    if text.value("hf_tokenizer_name"):  # read with the tokenizer
        cleaning.skip("*")
    else:
        cleaning.fixed("clean", "lower")
        cleaning.fixed("reduction_mask", "", None)
    cleaning.done()
    text.skip("hf_*")
    read: ImageConfig | ResNetConfig | VitImageConfig
    if isinstance(cfg.image, ResNetConfig):
        read = _resnet(cfg.image, image)
    elif isinstance(cfg.image, VitImageConfig):
        read = _timm(cfg.image, image, cfg.joint)
    else:
        read = _image(cfg.image, image, activation)
    cfg = replace(cfg, image=read, text=_text(cfg.text, text, activation))
    for fields in (image, text, model):
        fields.done()
    return cfg


def _resnet(c: ResNetConfig, image: Fields) -> ResNetConfig:
    image.fixed("timm_model_name", None, "")
    image.agree("layers", image.integers("layers"), c.blocks)
    image.skip("mlp_ratio", "patch_size", "timm_*", *(name for name in _OWN if name not in ("layers", "width")))
    _agree(image, "width", 64, c.width)
    image.agree("image_size", image.square("image_size", 224), c.size)
    return replace(c, heads=c.embed // image.integer("head_width", HEAD))


def _image(c: ImageConfig, image: Fields, activation: Activation) -> ImageConfig:
    image.fixed("timm_model_name", None, "")
    image.skip("timm_*", "attn_pooler_*")
    image.agree("patch_size", image.square("patch_size", 16), c.patch)
    image.agree("image_size", image.square("image_size", 224), c.size, _RESIZED)
    image.agree("no_ln_pre", image.boolean("no_ln_pre", False), not c.pre_norm)
    image.fixed("attentional_pool", False)
    image.fixed("pos_embed_type", "learnable", "sin_cos_2d")  # either is a tensor of the file
    mean: Any = "mean_norm" if image.boolean("final_ln_after_pool", False) else "norm_mean"
    c = replace(c, pool=image.choice("pool_type", {"tok": "cls", "avg": mean}, "tok"))
    return _tower(c, image, activation, 768, c.width // image.integer("head_width", HEAD))


def _timm(c: VitImageConfig, image: Fields, joint: int) -> VitImageConfig:
    """Complete timm's ViT with what its architecture of this name has, as open_clip's TimmModel builds it."""
    name = _architecture(image)
    image.skip(*_OWN, "timm_model_pretrained", "timm_drop", "timm_drop_path")
    pool = image.choice("timm_pool", _TIMM_POOLS, "avg")
    kinds: dict[str, Any] = {"none": "none", "": "affine", "linear": "linear"}
    given = image.value("timm_proj", "linear")
    image.fixed("timm_proj", None, *kinds, feature="a projection that is not one layer")
    kind = kinds[given or ""]
    if kind == "linear" and image.boolean("timm_proj_bias", False):
        # Its bias is not where timm's head has it: a tensor that no model here has.
        image.fixed("timm_proj_bias", False, feature="a projection with a bias next to timm's ViT")
    image.skip("timm_proj_bias")
    image.agree("timm_proj", kind, c.projection)
    size = image.square("image_size", 224)
    args: dict[str, Any] = dict(num_classes=0) | ({"global_pool": pool} if pool or kind != "linear" else {})
    if kind == "linear":  # timm builds its own pooling and then replaces it, without the norm that belongs to it
        usual = table()[name].get("global_pool", "token")
        args |= dict(fc_norm=table()[name].get("fc_norm", usual == "avg"))
    fields = arguments(name, args, f"{image.where}: {name}", dict(img_size=size))
    said = settings(fields, c)
    assert isinstance(said, VitImageConfig)
    return said


def _tower(c: Tower, fields: Fields, activation: Activation, width: int, heads: int) -> Tower:
    """Complete one tower with the heads, activation and eps of its config. width: open_clip's default."""
    acts, norms = fields.object("act_kwargs"), fields.object("norm_kwargs")
    if activation == "gelu":
        activation = acts.choice("approximate", {"none": "gelu", "tanh": "gelu_tanh"}, "none")
    c = replace(c, activation=activation, eps=norms.number("eps", c.eps))
    acts.done()
    norms.done()
    fields.fixed("block_type", None, "default")
    scale = fields.number("ls_init_value", None)
    if (scale is not None) != (c.layer_scale != 0):
        fields.agree("ls_init_value", scale, c.layer_scale or None)
    c = replace(c, layer_scale=scale or c.layer_scale)
    _agree(fields, "width", width, c.width)
    if plain(c):
        _agree(fields, "layers", 12, c.layers)
        ratio = fields.number("mlp_ratio", 4.0)
        if int(ratio * c.width) != c.hidden:
            sizes = f"{c.hidden} hidden units at width {c.width}: take the config of these weights"
            raise InputError(f"{fields.where}: mlp_ratio is {ratio:g}, and the weights have {sizes}")
        return replace(c, heads=heads)
    fields.skip("layers", "heads", "hidden", "head_width", "mlp_ratio")  # sizes of pruned layers, which the shapes give
    return c


def _agree(fields: Fields, name: str, usual: int, actual: int) -> None:
    fields.agree(name, fields.integer(name, usual), actual)


def _text(c: TextConfig, text: Fields, activation: Activation) -> TextConfig:
    text.fixed("embed_cls", False)
    text.boolean("final_ln_after_pool", False)  # the same for one token
    text.agree("context_length", text.integer("context_length", 77), c.context, _RESIZED)
    _agree(text, "vocab_size", 49408, c.vocab)
    bias = text.boolean("proj_bias", False)
    kind = text.choice("proj_type", {"linear": "affine" if bias else "linear", "none": "none"}, "linear")
    text.agree("proj_type with proj_bias", kind, c.projection)
    eos = text.integer("eos_id", 2, least=0)
    pools: dict[str, TextPool] = {"argmax": "eot", "eos": "eot", "last": "last", "first": "first"}
    pool = text.choice("pool_type", pools, "argmax")
    named = eos if text.text("pool_type", "argmax") == "eos" else None
    c = replace(c, eot=named, pool=pool, causal=not text.boolean("no_causal_mask", False))
    heads = text.integer("heads", 8) if plain(c) else 0
    return _tower(c, text, activation, 512, heads)


def write(cfg: ClipConfig, folder: Path) -> None:
    """Write open_clip's config, of its CLIP. Raises InputError for what it cannot express."""
    image, text = cfg.image, cfg.text
    quick = text.activation == "quick_gelu"
    if isinstance(image, ImageConfig) and (image.activation == "quick_gelu") != quick:
        both = f"{image.activation} in the image tower and {text.activation} in the text tower"
        raise InputError(f"open_clip has quick_gelu in both towers or in none, this model has {both}")
    text_cfg: dict[str, Any] = dict(context_length=text.context, vocab_size=text.vocab, heads=text.heads)
    text_cfg |= _written(text)
    text_cfg |= dict(pool_type=text.pool) if text.pool != "eot" else {}
    text_cfg |= dict(pool_type="eos", eos_id=text.eot) if text.pool == "eot" and text.eot is not None else {}
    text_cfg |= {} if text.causal else dict(no_causal_mask=True)
    text_cfg |= dict(proj_bias=True) if text.projection == "affine" else {}
    text_cfg |= dict(proj_type="none") if text.projection == "none" else {}
    if isinstance(image, ResNetConfig):
        vision_cfg: dict[str, Any] = dict(image_size=image.size, width=image.width)
        vision_cfg |= dict(layers=list(image.blocks), head_width=image.embed // image.heads)
    elif isinstance(image, VitImageConfig):
        vision_cfg = _written_timm(image)
    else:
        vision_cfg = dict(image_size=image.size, patch_size=image.patch, head_width=head_dim(image))
        vision_cfg |= _written(image) | ({} if plain(image) else dict(heads=image.heads))
        vision_cfg |= {} if image.pre_norm else dict(no_ln_pre=True)
        vision_cfg |= {} if image.pool == "cls" else dict(pool_type="avg")
        vision_cfg |= dict(final_ln_after_pool=True) if image.pool == "mean_norm" else {}
    model = dict(embed_dim=cfg.joint, quick_gelu=quick, vision_cfg=vision_cfg, text_cfg=text_cfg)
    model |= dict(init_logit_bias=-10) if cfg.logit_bias else {}
    write_json(folder / CONFIG, dict(model_cfg=model))


def _written(c: ImageConfig | TextConfig) -> dict[str, Any]:
    """Fields that both towers have."""
    # open_clip builds equal layers only; pruned ones get their sizes too, and the tensors have open_clip's names.
    ratio = dict(mlp_ratio=ratio_of(c.hidden, c.width)) if isinstance(c.hidden, int) else dict(hidden=c.hidden)
    about: dict[str, Any] = dict(width=c.width, layers=c.layers) | ratio
    about |= {} if plain(c) else dict(head_width=head_dim(c))
    about |= dict(act_kwargs=dict(approximate="tanh")) if c.activation == "gelu_tanh" else {}
    about |= dict(norm_kwargs=dict(eps=c.eps)) if c.eps != 1e-5 else {}
    return about | (dict(ls_init_value=c.layer_scale) if c.layer_scale else {})


def _written_timm(image: VitImageConfig) -> dict[str, Any]:
    """Fields of a tower of timm: the first architecture that is this ViT. Raises InputError when none is."""
    proj = {"none": "none", "affine": "", "linear": "linear"}[image.projection]
    pool = {"map": "map", "cls": "token", "mean_norm": "avg", "norm_mean": "avg"}.get(image.pool, "")
    about = dict(image_size=image.size, timm_model_pretrained=False, timm_pool=pool, timm_proj=proj)
    for name, built in table().items():
        # Sizes first: they are quick to compare.
        sizes = (built.get("embed_dim", 768), built.get("depth", 12), built.get("patch_size", 16))
        if built["class"] == CLASSES[0] and sizes == (image.width, image.layers, image.patch):
            found = about | dict(timm_model_name=name)
            try:
                if _timm(image, Fields(found, CONFIG), 0) == image:
                    return found
            except InputError:
                continue  # another model
    raise InputError("timm has no architecture of this image tower, and open_clip needs its name: keep another format")

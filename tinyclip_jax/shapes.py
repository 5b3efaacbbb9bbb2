"""The config of a CLIP as far as the names and shapes of its tensors tell it, in open_clip's names."""

from math import isqrt
from typing import Any

import numpy as np

from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError
from heirloom.common.vit.shapes import LAYER_SCALE, depth, refuse_other_parts
from heirloom.common.vit.shapes import shapes as vit_shapes
from tinyclip_jax.masks import per_layer
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig, uniform
from tinyclip_jax.resnet import STAGES, ResNetConfig
from tinyclip_jax.vit import Projection, VitImageConfig

HEAD = 64  # channels of a head in published models, but for the image towers of ViT-H, g, bigG and e
OPTIONS = ("pool", "pre_norm", "causal", "projection", "layer_scale")  # of the towers, whose defaults are CLIP's


def infer(tensors: Tensors, image: str, text: str) -> ClipConfig:
    """Infer the config from the shapes of open_clip's tensors; heads have 64 channels, activations are exact GELU.

    Layers of automatically pruned models differ: heads follow from in_proj, hidden units from c_fc, and are 0 where
    these are absent.
    """
    try:
        vocab, text_width = tensors[f"{text}token_embedding.weight"].shape
        context, (projection, joint) = len(tensors[f"{text}positional_embedding"]), _projection(tensors, text)
        blocks = _blocks(tensors, f"{text}transformer.resblocks.", text_width)
        text_tower = TextConfig(context=context, vocab=vocab, projection=projection, **blocks)
        joint, bias = joint or text_width, "logit_bias" in tensors
        if f"{image}layer1.0.conv1.weight" in tensors:
            return ClipConfig(_infer_resnet(tensors, image), text_tower, joint, bias)
        if f"{image}conv1.weight" not in tensors:
            return ClipConfig(_timm_tower(tensors, image), text_tower, joint, bias)
        width, _, patch, _ = tensors[f"{image}conv1.weight"].shape
        joint = tensors[f"{image}proj"].shape[1]
        grid = isqrt(len(tensors[f"{image}positional_embedding"]) - 1)
        blocks = _blocks(tensors, f"{image}transformer.resblocks.", width)
        blocks |= dict(pre_norm=f"{image}ln_pre.weight" in tensors)
        image_tower = ImageConfig(size=grid * patch, patch=patch, **blocks)
    except KeyError as error:
        raise InputError(f"tensor {error} is missing: this is not a whole CLIP with ViT and text towers") from error
    except (ValueError, IndexError) as error:  # names without a layer number, tensors with other axes
        raise InputError(f"its tensors are not those of a CLIP with ViT and text towers ({error})") from error
    return ClipConfig(image_tower, text_tower, joint, bias)


def _projection(tensors: Tensors, text: str) -> tuple[Projection, int]:
    """Projection of the text tower, and the size of the joint embedding, 0 where there is no projection."""
    if f"{text}text_projection.weight" in tensors:
        return "affine", len(tensors[f"{text}text_projection.weight"])
    if f"{text}text_projection" in tensors:
        return "linear", tensors[f"{text}text_projection"].shape[1]
    return "none", 0


def _timm_tower(tensors: Tensors, image: str) -> VitImageConfig:
    """Infer timm's ViT, all but its heads, pooling, activation and eps, which open_clip's config names."""
    within = f"{image}trunk."
    trunk = {key.removeprefix(within): value for key, value in tensors.items() if key.startswith(within)}
    inside = {key: value for key, value in trunk.items() if not key.startswith("head.")}
    refuse_other_parts(inside)
    cfg = vit_shapes(inside, "blocks.0.{}.weight", depth(inside, r"blocks\.(\d+)\."))
    linear = "linear" if f"{image}head.proj.weight" in tensors else "none"
    return VitImageConfig(**vars(cfg) | dict(projection="affine" if "head.weight" in trunk else linear))


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
    sizes |= dict(layer_scale=LAYER_SCALE if f"{prefix}0.ls_1.gamma" in tensors else 0.0)
    if set(packed) == {3 * width}:
        return sizes | dict(heads=width // HEAD)
    return sizes | dict(heads=uniform(tuple(n // (3 * HEAD) for n in packed)), head_dim=HEAD)


def complete(cfg: ClipConfig, tensors: Tensors, image: str, text: str) -> Tensors:
    """Add zeros for the norm and output bias that released files leave out of layers without heads."""
    tensors = {key: value for key, value in tensors.items() if value.size}
    for prefix, c in ((image, cfg.image), (text, cfg.text)):
        if not isinstance(c, ImageConfig | TextConfig):
            continue
        for i, heads in enumerate(per_layer(c.heads, c.layers)):
            for name in ("ln_1.weight", "ln_1.bias", "attn.out_proj.bias"):
                key = f"{prefix}transformer.resblocks.{i}.{name}"
                if not heads and key not in tensors:
                    tensors[key] = np.zeros(c.width, next(iter(tensors.values())).dtype)
    return tensors


def plain(c: ImageConfig | TextConfig | VitImageConfig) -> bool:
    """Whether all layers have the same sizes and their heads fill the width."""
    if not (isinstance(c.heads, int) and isinstance(c.hidden, int)):
        return False
    return c.head_dim is None or c.heads * c.head_dim == c.width


def unusual(cfg: ClipConfig) -> str:
    """The first setting that the CLIPs of OpenAI do not have, such as "text.causal is False"; empty for none."""
    found = {"logit_bias": True} if cfg.logit_bias else {}
    if isinstance(cfg.image, VitImageConfig):
        return "the image tower is timm's ViT"
    for name, c in (("image", cfg.image), ("text", cfg.text)):
        options = {key: getattr(c, key) for key in OPTIONS if hasattr(c, key)}
        found |= {f"{name}.{key}": value for key, value in options.items() if value != getattr(type(c), key)}
    return next((f"{key} is {value!r}" for key, value in found.items()), "")

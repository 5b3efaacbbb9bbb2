"""Read and write timm's config.json: an architecture, whose arguments are in a table, and those that differ."""

from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.family import Found, Read
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError
from heirloom.common.files import write_json
from heirloom.common.vit.model import VitConfig
from heirloom.common.vit.shapes import depth, refuse_other_parts, shapes
from heirloom.common.vit.timm_architectures import arguments, parts, settings, sizes
from learngene.bare_files import ordinary

# Fields of timm's pretrained_cfg: where weights come from, preprocessing, and names.
_PRETRAINED = (
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "custom_load",
    "test_input_size", "min_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std",
    "label_names", "label_descriptions", "labels", "pool_size", "test_pool_size", "first_conv", "classifier", "license",
    "description", "origin_url", "paper_name", "paper_ids", "notes",
)  # fmt: skip
# The architectures that are written, by eps and whether the MLP is gated: model_args state everything else.
_CLIP = ("vit_base_patch16_clip_224", dict(pre_norm=False))
_GATED = ("vit_giant_patch14_dinov2", dict(init_values=0.0))
_WRITTEN: dict[tuple[float, bool], tuple[str, dict[str, Any]]] = {
    (1e-6, False): ("vit_tiny_patch16_224", {}),
    (1e-5, False): _CLIP,
    (1e-6, True): _GATED,
}


def read(found: Found) -> Read | None:
    """Read a folder of timm, which has a config.json; without one the same tensors are a file of DeiT."""
    if not _is_vit(found.tensors) or (config := found.json("config.json")) is None:
        return None
    name, given = config.text("architecture").partition(".")[0], config.value("model_args")  # without timm's tag
    if not isinstance(given, dict | None):
        raise InputError(f"{config.where}: model_args is {given!r}, not an object")
    config.fixed("model_type", "timm_wrapper")  # as transformers wraps it
    config.transformers()
    config.skip("do_pooling", "label_names", "label_descriptions", "labels", "license")
    # timm's old configs have one level.
    pretrained = config.object("pretrained_cfg") if "pretrained_cfg" in config else config
    pretrained.skip(*_PRETRAINED)
    pretrained.fixed("label_offset", 0, None, feature="logits in front of those of the classes")
    args = arguments(name, given or {}, f"{config.where}: {name} with its model_args", _defaults(config, pretrained))
    cfg = shapes(found.tensors, "blocks.0.{}.weight", depth(found.tensors, r"blocks\.(\d+)\."))
    cfg = settings(args, cfg)
    # timm writes these fields, but builds from architecture and model_args only.
    implied = {"cls": "token", "cls+dist": "token", "map": "map"}.get(cfg.pool, "avg")
    config.fixed("global_pool", implied, None, feature="and not what model_args imply")
    config.agree("num_features", config.integer("num_features", cfg.width), cfg.width)
    for fields in (pretrained, config):
        fields.done()
    refuse_other_parts(found.tensors)
    return Read(cfg)


def _is_vit(tensors: Tensors) -> bool:
    return all(any(key.startswith(part) for key in tensors) for part in ("patch_embed.", "blocks.0."))


def _defaults(config: Fields, pretrained: Fields) -> dict[str, Any]:
    """timm's values for arguments that neither model_args nor the architecture set."""
    size = pretrained.integers("input_size", (3, 224, 224), length=3)
    fixed = pretrained.boolean("fixed_input_size", False)
    classes = pretrained.integer("num_classes", 1000, least=0)
    classes = config.integer("num_classes", classes, least=0)
    return dict(img_size=size[1:] if fixed else 224, in_chans=size[0], num_classes=classes)


def write(cfg: VitConfig, folder: Path) -> None:
    """Write timm's config.json. Raises InputError, with nothing written, for a model it cannot express."""
    ordinary(cfg, "timm")
    pooled: dict[str, Any] = {"pool": cfg.pool} if cfg.pool == "cls+mean" else {}
    pooled |= {name: cfg.options[name] for name in ("pooler", "joint") if name in cfg.options}
    pooled |= {"resample": cfg.resample} if cfg.any_size and cfg.resample != "antialiased" else {}
    if pooled:
        name, value = next(iter(pooled.items()))
        raise InputError(f"{name} is {value!r}, which timm's ViT does not have; keep the heirloom format")
    distilled = cfg.tokens == "cls+dist"
    if (cfg.eps, cfg.gated) not in _WRITTEN or (distilled and cfg.eps != 1e-6):
        theirs = f"an eps of {'1e-6' if distilled or cfg.gated else '1e-6 or 1e-5'}, this model has {cfg.eps:g}"
        raise InputError(f"timm's configs have {theirs}: convert with --set eps=1e-6 if its outputs may differ")
    if distilled and (cfg.pool != "cls+dist" or cfg.registers or cfg.gated):
        raise InputError("timm's distilled ViT has two heads and nothing else; keep the heirloom format")
    if cfg.positions == "cls" and cfg.registers:
        raise InputError(
            "positions is 'cls', and timm gives positions to all tokens or to patches alone: keep the heirloom format"
        )
    name, others = ("deit_tiny_distilled_patch16_224", {}) if distilled else _WRITTEN[cfg.eps, cfg.gated]
    args = sizes(cfg) | others | parts(cfg)
    if cfg.activation != ("silu" if cfg.gated else "gelu"):
        args |= dict(act_layer=cfg.activation)
    pretrained = dict(num_classes=cfg.classes, input_size=[cfg.channels, *cfg.picture], fixed_input_size=True)
    pretrained |= dict(first_conv="patch_embed.proj", classifier=["head", "head_dist"] if distilled else "head")
    about = dict(architecture=name, num_classes=cfg.classes, num_features=cfg.width)
    about |= dict(model_args=args, pretrained_cfg=pretrained)
    write_json(folder / "config.json", about)

"""Write common/vit/timm_architectures.json: what timm's function of each ViT's name passes to which class, and the
preprocessing that timm's trainer uses for that name.

    python scripts/make_timm_table.py                  # needs the extra `parity`, and timm without its dependencies

A config.json of timm names an architecture and the arguments that differ from it, so that a name is half of the config.
No model is built: each function is called up to the point where it would. Of classes other than VisionTransformer the
name alone is kept.
"""

import json
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torchvision_stand_in import installed

with installed():
    import timm
    from timm.layers import SwiGLUPacked, get_act_layer
    from timm.models import beit, deit, eva, vision_transformer, vision_transformer_hybrid, vision_transformer_relpos
    from timm.models._registry import _deprecated_models, _model_default_cfgs, _model_entrypoints

FILE = Path(__file__).parents[1] / "common" / "vit" / "timm_architectures.json"
PREFIXES = ("vit_", "deit", "beit", "flexivit")
MODULES = (beit, deit, eva, vision_transformer, vision_transformer_hybrid, vision_transformer_relpos)
CLASSES = ("VisionTransformer", "VisionTransformerDistilled")
ACTIVATIONS = {get_act_layer(name): name for name in ("gelu", "gelu_tanh", "quick_gelu")} | {torch.nn.GELU: "gelu"}
# Of loading and feature extraction, not of the model.
OTHERS = (
    "pretrained_filter_fn",
    "pretrained_strict",
    "feature_cfg",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
)
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


class Stop(Exception):
    """Carries what a function was about to build."""


def architecture(name: str, **overrides: Any) -> dict[str, Any]:
    """The class and arguments that timm's function of this name builds a model with."""

    def build(model: Any, variant: str, pretrained: bool, *args: Any, **kwargs: Any) -> None:
        raise Stop(model, kwargs)

    with warnings.catch_warnings(), ExitStack() as patched:
        warnings.simplefilter("ignore")
        for module in MODULES:  # each has imported it under its own name
            patched.enter_context(patch.object(module, "build_model_with_cfg", build))
        try:
            _model_entrypoints[name](pretrained=False, **overrides)
        except Stop as stop:
            model, kwargs = stop.args
    kind = getattr(model, "__name__", None) or model.func.__name__
    if kind not in CLASSES:
        return {"class": kind}
    return {"class": kind} | {
        key: told(key, value) for key, value in kwargs.items() if key not in OTHERS and value is not None
    }


def told(name: str, value: Any) -> Any:
    """An argument as JSON: layers by timm's names for them, norms with their eps, other classes by their own names."""
    if name == "act_layer" and value in ACTIVATIONS:
        return ACTIVATIONS[value]
    if value is SwiGLUPacked:
        return "SwiGLUPacked"
    if name == "norm_layer":
        kind = value.func if isinstance(value, partial) else value
        if not isinstance(kind, str) and issubclass(kind, torch.nn.LayerNorm):
            return f"layernorm eps={value(8).eps:g}"
    if isinstance(value, str | int | float | bool | list | tuple):
        return value
    return getattr(value.func if isinstance(value, partial) else value, "__name__", repr(value))


def preprocessing(name: str) -> dict[str, dict[str, Any]]:
    """timm's preprocessing of an architecture, by its name; of a tag with another one by `name.tag`, too."""
    current, _, tag = _deprecated_models.get(name, name).partition(".")
    known = _model_default_cfgs[current]
    fields = {tag: {field: getattr(cfg, field) for field in PREPROCESSING} for tag, cfg in known.cfgs.items()}
    default = fields.get(tag, fields[known.tags[0]])
    others = {f"{name}.{tag}": values for tag, values in fields.items() if values != default}
    return {name: default} | (others if current == name else {})


def main() -> None:
    table = {}
    for name in sorted(name for name in _model_entrypoints if name.startswith(PREFIXES)):
        table[name] = architecture(name)
        if len(table[name]) > 1:  # model_args win over what the function sets, or the table would not do
            for key, value in table[name].items():
                if key != "class" and isinstance(value, int | float):
                    assert architecture(name, **{key: value + 1})[key] == value + 1, (name, key)
    names: dict[str, list[str]] = {}
    for architecture_ in (name for name, args in table.items() if args["class"] in CLASSES):
        for name, values in preprocessing(architecture_).items():
            names.setdefault(json.dumps(values), []).append(name)
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(args)}" for name, args in table.items())
    shared = ",\n".join(f'    {{"fields": {values}, "of": {json.dumps(of)}}}' for values, of in names.items())
    parts = f'"architectures": {{\n{lines}\n  }},\n  "preprocessing": [\n{shared}\n  ]'
    FILE.write_text(f'{{\n  "timm": "{timm.__version__}",\n  {parts}\n}}\n')
    print(f"{FILE}: {len(table)} architectures of timm {timm.__version__}")


if __name__ == "__main__":
    main()

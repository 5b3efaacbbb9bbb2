"""Converted ViTs against the library that reads the foreign file, or formulas in torch, on the same pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.flax_files import as_torch
from heirloom.common.checkpoint.names import clean_names
from heirloom.common.checkpoint.unwrap import open_weights
from heirloom.common.checkpoint.verify import (
    OWN,
    RENAMED,
    Check,
    against,
    as_folder,
    compare,
    importable,
    outputs,
    quiet,
    reference_tensors,
)
from heirloom.common.files import read_json
from heirloom.common.nn.functional import functional
from heirloom.common.vit.formulas import formulas
from heirloom.common.vit.model import Vit, VitConfig
from heirloom.common.vit.stages import linear_coefficients, unrolled_map
from learngene import google_files
from learngene.bare_files import clean, timm_names
from learngene.hf_models import DEIT, MAE, VIT

EXAMPLES = 2


def pictures(cfg: VitConfig) -> np.ndarray:
    """Seeded inputs, [2, height, width, channels] f32."""
    return np.random.default_rng(0).standard_normal((EXAMPLES, *cfg.picture, cfg.channels)).astype(np.float32)


def logits(cfg: VitConfig, params: Mapping[str, Any]) -> list[np.ndarray]:
    """The model's logits for these inputs, [2, classes] f32."""
    return outputs(functional(Vit, cfg).apply, params, pictures(cfg))


def verify(cfg: VitConfig, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Compare logits, f32 at highest precision, with the library that reads `file` and config; tolerance 1e-4.

    Where timm is not installed, or the file has no config, a ViT's formulas in torch serve: they share our reading of
    the config, and the check says so. Without torch only finiteness can be checked: `reference` is None.
    """
    x = pictures(cfg)
    mine = logits(cfg, params)

    def reference() -> Check:
        if format in ("hf", "flax") and importable("transformers"):
            theirs = transformers_outputs(file, x, cfg, format)
            name = "transformers" + (RENAMED if format == "flax" else "")
            return compare(mine, [theirs], reference=name, libraries=("torch", "transformers"))
        if format == "timm" and importable("timm"):
            return compare(mine, [timm_logits(file, x)], reference="timm", libraries=("torch", "timm"))
        tensors = clean_names(open_weights(file)).tensors
        return compare(mine, [formulas(cfg, as_timm(cfg, tensors, format), x)], reference=OWN, libraries=("torch",))

    return against(reference, mine, format, what="logits")


def transformers_outputs(file: Path, x: np.ndarray, vit: VitConfig, format: str = "hf") -> np.ndarray:
    """What transformers' class for the config's `architectures`, else `model_type`, makes of `x` as in `pictures`.

    These are logits, the projected or the pooled features; of a class that returns all tokens, those that the pool of
    `vit` takes. vit: our reading; it says whether the weights have a pooler, which no config does, and how many classes
    where the config does not: transformers would take 2.
    """
    import torch
    import transformers

    with quiet(), as_folder(file, "model.safetensors", format) as folder:
        about = read_json(folder / "config.json")
        extra: dict[str, Any] = {} if {"id2label", "num_labels"} & about.keys() else {"num_labels": vit.classes}
        extra |= {"mask_ratio": 0.0} if about["model_type"] == MAE.kind else {}  # an encoder reads all patches
        cfg = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **extra)
        kind = transformers.AutoModelForImageClassification if vit.classes else transformers.AutoModel
        if cfg.architectures:
            kind = getattr(transformers, cfg.architectures[0].removeprefix("Flax"))
        how = dict(add_pooling_layer=vit.pooler) if kind.__name__ in (VIT.name, DEIT.name) else {}
        model = kind.from_pretrained(folder, config=cfg, dtype=torch.float32, local_files_only=True, **how).eval()
    pictures = torch.from_numpy(x).permute(0, 3, 1, 2)
    if kind.__name__ == MAE.headed:
        model = model.vit
    with torch.no_grad():
        if about["model_type"] == MAE.kind:  # patches are shuffled by this noise: in order
            order = torch.arange(vit.grid[0] * vit.grid[1]).expand(len(x), -1)
            return _pooled(model(pictures, noise=order.float()), vit)
        return _pooled(model(pictures), vit)


def _pooled(outputs: Any, vit: VitConfig) -> np.ndarray:
    """The logits, else the projected or the pooled features of transformers' outputs."""
    for name in ("logits", "image_embeds", "pooler_output"):
        if (value := outputs.get(name)) is not None:
            return value.numpy()
    tokens = outputs["last_hidden_state"].numpy()
    return tokens[:, 0] if vit.pool == "cls" else tokens[:, vit.prefix :].mean(1)


def timm_logits(file: Path, x: np.ndarray) -> np.ndarray:
    """Logits of the model that timm builds from the config next to `file`; `x` as in `pictures`."""
    import timm
    import torch

    about = read_json(file.parent / "config.json")
    outer = ("architecture", "num_features", "model_args", "global_pool", "labels")
    pretrained = dict(about.get("pretrained_cfg") or {key: value for key, value in about.items() if key not in outer})
    if "num_classes" in about:
        pretrained["num_classes"] = about["num_classes"]
    args = about.get("model_args") or {}
    model = timm.create_model(about["architecture"], pretrained_cfg=pretrained, **args).eval()
    model.load_state_dict(reference_tensors(file))
    with torch.no_grad():
        return model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


def as_timm(cfg: VitConfig, tensors: Mapping[str, np.ndarray], format: str) -> dict[str, np.ndarray]:
    """Tensors of another format under timm's names, genes unrolled, by plain renaming, slicing and concatenation."""
    if format in ("sws", "tleg"):
        return _unrolled(cfg, tensors, format)
    if format == "google":
        return _from_google(cfg, tensors)
    tensors = as_torch(dict(tensors)) if format == "flax" else tensors
    return timm_names(cfg, {clean(key): value for key, value in tensors.items()})


def _unrolled(cfg: VitConfig, tensors: Mapping[str, np.ndarray], format: str) -> dict[str, np.ndarray]:
    out = {key: value for key, value in tensors.items() if not key.startswith("blocks.")}
    modules = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for name in (f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")):
        module, leaf = name.rsplit(".", 1)
        instances = f"blocks.block.{module}.instances"
        if format == "sws":
            layers = [tensors[f"{instances}.{stage}.{leaf}"] for stage in unrolled_map(cfg.layout)]
        else:
            base, slope = (tensors[f"{instances}.0.{leaf}_{part}"] for part in ("base", "ilayer"))
            layers = [base + share * slope for share in linear_coefficients(cfg.depth)[:, 1]]
        out |= {f"blocks.{i}.{name}": value for i, value in enumerate(layers)}
    return out


def _from_google(cfg: VitConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    w = {google_files.clean(key): value for key, value in tensors.items()}
    patches, bias = w["embedding/kernel"].transpose(3, 2, 0, 1), w["embedding/bias"]
    out = {"patch_embed.proj.weight": patches, "patch_embed.proj.bias": bias}
    cls = {"cls_token": w["cls"]} if "cls" in w else {}
    out |= {"pos_embed": w["Transformer/posembed_input/pos_embedding"]} | cls
    out |= {"norm.weight": w["Transformer/encoder_norm/scale"], "norm.bias": w["Transformer/encoder_norm/bias"]}
    out |= {"head.weight": w["head/kernel"].T, "head.bias": w["head/bias"]}
    for i in range(cfg.layers):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        kernels = [w[f"{attention}/{p}/kernel"].reshape(cfg.width, cfg.width) for p in ("query", "key", "value")]
        out[f"{ours}.attn.qkv.weight"] = np.concatenate([kernel.T for kernel in kernels])
        biases = [w[f"{attention}/{p}/bias"].reshape(-1) for p in ("query", "key", "value")]
        out[f"{ours}.attn.qkv.bias"] = np.concatenate(biases)
        out[f"{ours}.attn.proj.weight"] = w[f"{attention}/out/kernel"].reshape(cfg.width, cfg.width).T
        out[f"{ours}.attn.proj.bias"] = w[f"{attention}/out/bias"]
        for number, layer in enumerate(("fc1", "fc2")):
            out[f"{ours}.mlp.{layer}.weight"] = w[f"{theirs}/MlpBlock_3/Dense_{number}/kernel"].T
            out[f"{ours}.mlp.{layer}.bias"] = w[f"{theirs}/MlpBlock_3/Dense_{number}/bias"]
        for norm, layer in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{ours}.{norm}.weight"] = w[f"{theirs}/{layer}/scale"]
            out[f"{ours}.{norm}.bias"] = w[f"{theirs}/{layer}/bias"]
    return out

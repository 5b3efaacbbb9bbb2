"""Converted CLIPs against torch: the same pictures and captions through our model and through the reference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
    torch_activation,
)
from heirloom.common.files import read_json
from heirloom.common.nn.functional import functional
from heirloom.common.vit.formulas import formulas
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, head_dim
from tinyclip_jax.open_clip_folder import CONFIG
from tinyclip_jax.resnet import ResNetConfig
from tinyclip_jax.vit import VitImageConfig

EXAMPLES = 4
BUFFERS = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # of OpenAI's archives and older releases


def inputs(cfg: ClipConfig) -> tuple[np.ndarray, np.ndarray]:
    """Seeded pictures [4, size, size, 3] f32 and captions [4, context] int32 of several lengths, the last one full."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((EXAMPLES, cfg.image.size, cfg.image.size, 3)).astype(np.float32)
    eot = cfg.text.vocab - 1 if cfg.text.eot is None else cfg.text.eot
    tokens = np.zeros((EXAMPLES, cfg.text.context), np.int32)
    words = np.delete(np.arange(cfg.text.vocab), eot)
    for row, length in zip(tokens, np.linspace(3, cfg.text.context, EXAMPLES).astype(int), strict=True):
        row[: length - 1] = rng.choice(words, length - 1)
        row[length - 1] = eot
    return images, tokens


def features(cfg: ClipConfig, params: Mapping[str, Any]) -> list[np.ndarray]:
    """Unit-norm features of these pictures and captions, [4, joint] f32 each."""
    return outputs(functional(Clip, cfg).apply, params, *inputs(cfg))[:2]  # without the scale


def verify(cfg: ClipConfig, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Compare unit-norm features, f32 at highest precision, with the library that reads `file`; tolerance 1e-4.

    Where open_clip is not installed, or the file has no config of its, open_clip's formulas in torch serve: they share
    our reading of the config, and the check says so. Without torch only finiteness can be checked: `reference` is None.
    """
    images, tokens = inputs(cfg)
    mine = features(cfg, params)

    def reference() -> Check:
        if format in ("hf", "flax"):
            theirs = _transformers(file, images, tokens, format)
            name = "transformers" + (RENAMED if format == "flax" else "")
            return compare(mine, theirs, reference=name, libraries=("torch", "transformers"))
        if format == "open_clip" and _builds(cfg) and (file.parent / CONFIG).is_file() and importable("open_clip"):
            theirs = _open_clip(file, images, tokens)
            return compare(mine, theirs, reference="open_clip", libraries=("torch", "open_clip_torch"))
        return compare(mine, _formulas(cfg, file, format, images, tokens), reference=OWN, libraries=("torch",))

    needs = ("torch", "transformers") if format in ("hf", "flax") else ("torch",)
    return against(reference, mine, format, what="features", needs=needs)


def _builds(cfg: ClipConfig) -> bool:
    """Whether open_clip can build it: it knows no pruned layers."""
    towers = [c for c in (cfg.image, cfg.text) if not isinstance(c, ResNetConfig)]
    return all(
        isinstance(c.heads, int) and isinstance(c.hidden, int) and c.heads * head_dim(c) == c.width for c in towers
    )


def _transformers(file: Path, images: np.ndarray, tokens: np.ndarray, format: str) -> list[np.ndarray]:
    """Features of the class that transformers has for the config's `model_type`."""
    import torch
    from transformers import AutoModel

    with as_folder(file, "model.safetensors", format) as folder, quiet():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        pixels, ids = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
        out = model(pixel_values=pixels, input_ids=ids)
    return [out.image_embeds.numpy(), out.text_embeds.numpy()]


def _open_clip(file: Path, images: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
    """Features of the model that open_clip builds from its own config."""
    import torch
    from open_clip.model import CLIP, CustomTextCLIP

    config = read_json(file.parent / CONFIG)["model_cfg"]
    kind = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    config["vision_cfg"].pop("timm_model_pretrained", None)  # timm would download weights
    model = kind(**config).eval()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    tensors = {key: value for key, value in reference_tensors(file).items() if key not in BUFFERS}
    shaped = {key: value.reshape(shapes[key]) if value.numel() == 1 else value for key, value in tensors.items()}
    model.load_state_dict(shaped)
    with torch.no_grad():
        image = model.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2), normalize=True)
        return [image.numpy(), model.encode_text(torch.from_numpy(tokens).long(), normalize=True).numpy()]


def _formulas(cfg: ClipConfig, file: Path, format: str, images: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
    """open_clip's forward pass on the foreign file's own tensors, packed projections and all."""
    import torch
    import torch.nn.functional as F

    from tinyclip_jax.formats import FORMATS

    clean = next(f.clean for f in FORMATS if f.name == format)
    # The original files are open_clip's under a prefix per tower.
    found = ((clean(k), v) for k, v in reference_tensors(file).items())
    t = {k.replace("_image_encoder.", "").replace("_text_encoder.", ""): v for k, v in found}

    def norm(x: Any, name: str, eps: float) -> Any:
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def blocks(x: Any, prefix: str, c: Any, mask: Any) -> Any:
        for i in range(c.layers):
            p = f"{prefix}transformer.resblocks.{i}"
            if f"{p}.attn.in_proj_weight" in t:
                y = norm(x, f"{p}.ln_1", c.eps)
                packed = F.linear(y, t[f"{p}.attn.in_proj_weight"], t[f"{p}.attn.in_proj_bias"])
                q, k, v = packed.reshape(*y.shape[:2], 3, -1, head_dim(c)).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
                x = x + F.linear(y, t[f"{p}.attn.out_proj.weight"]) * t.get(f"{p}.ls_1.gamma", 1)
            # Of a layer without heads the files of the release keep nothing, ours this.
            x = x + t.get(f"{p}.attn.out_proj.bias", 0) * t.get(f"{p}.ls_1.gamma", 1)
            if f"{p}.mlp.c_fc.weight" in t:
                y = F.linear(norm(x, f"{p}.ln_2", c.eps), t[f"{p}.mlp.c_fc.weight"], t[f"{p}.mlp.c_fc.bias"])
                y = F.linear(torch_activation(c.activation)(y), t[f"{p}.mlp.c_proj.weight"])
                x = x + y * t.get(f"{p}.ls_2.gamma", 1)
            x = x + t[f"{p}.mlp.c_proj.bias"] * t.get(f"{p}.ls_2.gamma", 1)
        return x

    def bottleneck(x: Any, p: str, stride: int) -> Any:
        pool = lambda x: F.avg_pool2d(x, stride)  # noqa: E731
        y = F.relu(batch_norm(F.conv2d(x, t[f"{p}.conv1.weight"]), f"{p}.bn1"))
        y = F.relu(batch_norm(F.conv2d(y, t[f"{p}.conv2.weight"], padding=1), f"{p}.bn2"))
        y = batch_norm(F.conv2d(pool(y), t[f"{p}.conv3.weight"]), f"{p}.bn3")
        if f"{p}.downsample.0.weight" in t:
            x = batch_norm(F.conv2d(pool(x), t[f"{p}.downsample.0.weight"]), f"{p}.downsample.1")
        return F.relu(x + y)

    def batch_norm(x: Any, p: str) -> Any:
        mean, variance, scale, bias = (t[f"{p}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, scale, bias, eps=1e-5)

    def resnet(c: ResNetConfig, x: Any) -> Any:
        for i, stride in ((1, 2), (2, 1), (3, 1)):
            x = F.relu(batch_norm(F.conv2d(x, t[f"visual.conv{i}.weight"], stride=stride, padding=1), f"visual.bn{i}"))
        x = F.avg_pool2d(x, 2)
        for stage, count in enumerate(c.blocks, 1):
            for i in range(count):
                x = bottleneck(x, f"visual.layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1)
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + t["visual.attnpool.positional_embedding"][:, None]
        q, k, v = (t[f"visual.attnpool.{n}_proj.weight"] for n in "qkv")
        biases = torch.cat([t[f"visual.attnpool.{n}_proj.bias"] for n in "qkv"])
        out, _ = F.multi_head_attention_forward(
            x, x, x, c.embed, c.heads, None, biases, None, None, False, 0.0, t["visual.attnpool.c_proj.weight"],
            t["visual.attnpool.c_proj.bias"], training=False, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=q, k_proj_weight=k, v_proj_weight=v,
        )  # fmt: skip
        return out[0]

    def vit(c: ImageConfig, x: Any) -> Any:
        x = F.conv2d(x, t["visual.conv1.weight"], stride=c.patch)
        x = torch.cat([t["visual.class_embedding"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + t["visual.positional_embedding"]
        x = blocks(norm(x, "visual.ln_pre", c.eps) if c.pre_norm else x, "visual.", c, None)
        if c.pool == "norm_mean":
            return norm(x[:, 1:], "visual.ln_post", c.eps).mean(1) @ t["visual.proj"]
        x = x[:, 0] if c.pool == "cls" else x[:, 1:].mean(1)
        return norm(x, "visual.ln_post", c.eps) @ t["visual.proj"]

    def timm(c: VitImageConfig) -> Any:
        inside = {k.removeprefix("visual.trunk."): v.numpy() for k, v in t.items() if k.startswith("visual.trunk.")}
        y = torch.from_numpy(formulas(c, inside, images))
        return F.linear(y, t["visual.head.proj.weight"]) if "visual.head.proj.weight" in t else y

    def picked(x: Any, ids: Any) -> Any:
        if cfg.text.pool != "eot":
            return x[:, {"first": 0, "last": -1}[cfg.text.pool]]
        end = ids.argmax(-1) if cfg.text.eot is None else (ids == cfg.text.eot).int().argmax(-1)
        return x[torch.arange(len(x)), end]

    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        if isinstance(cfg.image, VitImageConfig):
            image = timm(cfg.image)
        else:
            image = resnet(cfg.image, pixels) if isinstance(cfg.image, ResNetConfig) else vit(cfg.image, pixels)
        ids = torch.from_numpy(tokens).long()
        x = t["token_embedding.weight"][ids] + t["positional_embedding"][: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1) if cfg.text.causal else None
        text = picked(norm(blocks(x, "", cfg.text, mask), "ln_final", cfg.text.eps), ids)
        if cfg.text.projection == "affine":
            text = F.linear(text, t["text_projection.weight"], t["text_projection.bias"])
        elif cfg.text.projection == "linear":
            text = text @ t["text_projection"]
    return [F.normalize(y, dim=-1).numpy() for y in (image, text)]

"""How many of the models that open_clip ships a config for are read here, and read right.

    python scripts/count_open_clips.py                 # needs the extra `parity`, and open_clip_torch and timm without
    their dependencies
    python scripts/count_open_clips.py --page docs/coverage.md        # and write the counts there

Each config is built by open_clip itself, made small in width and depth alone, with random weights in which a wrong
setting shows, saved as open_clip saves it, and opened by heirloom: *right* where features agree to 1e-4, *wrong* where
they do not, *refused* with the reason. Towers of transformers, and those of timm that are not its plain
VisionTransformer, are not built: their names alone decide.
"""

import copy
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import torch
from counting import count, perturb
from safetensors.torch import save_file
from torchvision_stand_in import installed

from heirloom.common.checkpoint.family import Donor
from heirloom.common.errors import InputError
from heirloom.common.vit.timm_architectures import arguments, table
from tinyclip_jax.verify import inputs
from tinyclip_jax.zoo import FAMILY

with installed():
    import open_clip
    import timm
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

CONFIGS = {file.stem: file for file in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))}
LAYERS = 2


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with two layers, narrow: whatever changes the function stays."""
    config = copy.deepcopy(config)
    image, text = config["vision_cfg"], config["text_cfg"]
    vocab = max(600, text.get("eos_id", 2) + 1)
    text |= dict(layers=LAYERS, heads=2, width=32, vocab_size=vocab)
    config["embed_dim"] = 24
    if name := image.get("timm_model_name"):
        width, size = (timm_sizes(name)[key] for key in ("embed_dim", "img_size"))
        image["image_size"] = size
        config["embed_dim"] = width if image.get("timm_proj") == "none" else 24
        text["width"] = config["embed_dim"] if text.get("proj_type") == "none" else 32
    elif isinstance(image.get("layers"), list):
        image |= dict(layers=[1, 1, 1, 1], width=16, image_size=64, head_width=32)
    else:
        head = image.get("head_width", 64)
        image |= dict(layers=LAYERS, width=2 * head, image_size=2 * image.get("patch_size", 16))
    for tower in (image, text):
        if "mlp_ratio" in tower:
            tower["mlp_ratio"] = round(tower["mlp_ratio"])
    return config


def timm_sizes(name: str) -> dict[str, int]:
    """Sizes of a small model of this architecture."""
    return dict(embed_dim=8 * table()[name]["num_heads"], depth=LAYERS, img_size=2 * table()[name]["patch_size"])


def small_timm(name: str | None) -> Any:
    """Within it, timm builds a small model of this architecture."""
    create = timm.create_model
    return patch.object(timm, "create_model", lambda *args, **given: create(*args, **given | timm_sizes(str(name))))


def is_read(name: str) -> bool:
    try:
        arguments(name, {}, "")
    except InputError:
        return False
    return True


def build(config: dict[str, Any]) -> torch.nn.Module:
    """The model, with random weights. From here on, the architecture of timm that it names is a small one."""
    kwargs = copy.deepcopy(config)
    custom = kwargs.pop("custom_text", False)
    kind = CoCa if "multimodal_cfg" in kwargs else CustomTextCLIP if custom else CLIP
    torch.manual_seed(0)
    name = kwargs["vision_cfg"].get("timm_model_name")
    with small_timm(name):
        model = kind(**kwargs).eval()
    if name:
        table()[name].update(timm_sizes(name))  # type: ignore[attr-defined]
    perturb(model)
    return model


def save(name: str, folder: Path) -> torch.nn.Module | None:
    """Write the model's folder; None where a tower is of another library, which is not built."""
    config, model = json.loads(CONFIGS[name].read_text()), None
    image, text = config["vision_cfg"].get("timm_model_name"), config["text_cfg"].get("hf_model_name")
    if text or (image and not is_read(image)):
        keys = ["text.transformer.x"] if text else ["visual.trunk.x", "token_embedding.weight"]
        tensors = {key: torch.zeros(1) for key in keys}
    else:
        config = small(config)
        model = build(config)
        tensors = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return model
def difference(model: Any, donor: Donor, params: Mapping[str, np.ndarray]) -> float:
    """The largest difference between features of unit norm."""
    assert model is not None, "opened without its tower"
    images, tokens = inputs(donor.cfg)
    ours = jax.jit(donor.model.apply)(params, images, tokens)
    image = model.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2), normalize=True).numpy()
    text = model.encode_text(torch.from_numpy(tokens).long(), normalize=True).numpy()
    return float(np.max([np.abs(ours.image - image).max(), np.abs(ours.text - text).max()]))  # NaN where one of them is


def reason(said: str) -> str:
    """The part that a refusal names, without the model."""
    if (kind := re.search(r"as its class (\w+)", said)) is not None:
        return f"an image tower of timm's class {kind[1]}"
    if (name := re.search(r"timm_model_name is '([a-z]+)", said)) is not None:
        return f"an image tower of timm: {name[1]}"
    if (part := re.search(r"\w+ is [^(;]*\(([^;]*)\);", said)) is not None:
        return part[1]
    return said


if __name__ == "__main__":
    # Compiling is most of it: of many names the small models are the same, and are compiled once.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    count(__doc__, open_clip, CONFIGS, FAMILY, save, difference, reason)

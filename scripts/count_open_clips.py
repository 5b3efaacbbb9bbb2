"""How many of the models that open_clip ships a config for are read here, and read right.

    python scripts/count_open_clips.py                 # needs the extra `parity`, and open_clip_torch and timm without
    their dependencies

Each config is built by open_clip itself, made small in width and depth alone, with random weights in which a wrong
setting shows, saved as open_clip saves it, and opened by heirloom: *right* where features agree to 1e-4, *wrong* where
they do not, *refused* with the reason. Towers of timm and of transformers are not built: their tensors' names alone
decide.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from counting import count, perturb
from safetensors.torch import save_file
from torchvision_stand_in import installed

from heirloom.common.checkpoint.family import Donor
from tinyclip_jax.verify import inputs
from tinyclip_jax.zoo import FAMILY

with installed():
    import open_clip
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

CONFIGS = {file.stem: file for file in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with two layers, narrow: whatever changes the function stays."""
    config = copy.deepcopy(config)
    image, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 24
    if isinstance(image.get("layers"), list):
        image |= dict(layers=[1, 1, 1, 1], width=16, image_size=64, head_width=32)
    else:
        head = image.get("head_width", 64)
        image |= dict(layers=2, width=2 * head, image_size=2 * image.get("patch_size", 16))
    vocab = max(600, text.get("eos_id", 2) + 1)
    text |= dict(layers=2, heads=2, width=32, vocab_size=vocab)
    for tower in (image, text):
        if "mlp_ratio" in tower:
            tower["mlp_ratio"] = round(tower["mlp_ratio"])
    return config


def build(config: dict[str, Any]) -> torch.nn.Module:
    kwargs = copy.deepcopy(config)
    custom = kwargs.pop("custom_text", False)
    kind = CoCa if "multimodal_cfg" in kwargs else CustomTextCLIP if custom else CLIP
    torch.manual_seed(0)
    model = kind(**kwargs).eval()
    perturb(model)
    return model


def save(name: str, folder: Path) -> torch.nn.Module | None:
    """Write the model's folder; None where a tower is of another library, which is not built."""
    config, model = json.loads(CONFIGS[name].read_text()), None
    image, text = config["vision_cfg"], config["text_cfg"]
    elsewhere = {"visual.trunk.x": image.get("timm_model_name"), "text.transformer.x": text.get("hf_model_name")}
    if keys := [key for key, tower in elsewhere.items() if tower]:
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


if __name__ == "__main__":
    count(__doc__, open_clip, CONFIGS, FAMILY, save, difference)

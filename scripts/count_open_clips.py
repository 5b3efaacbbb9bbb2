"""How many of the models that open_clip ships a config for are read here, and read right.

    python scripts/count_open_clips.py                 # needs the extra `parity`, and open_clip_torch and timm without their dependencies

Each config is built by open_clip itself, made small in width and depth alone, with random weights in which a wrong setting shows, saved as
open_clip saves it, and opened by heirloom: *right* where features agree to 1e-4, *wrong* where they do not, *refused* with the reason.
Towers of timm and of transformers are not built: their tensors' names alone decide.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.torch import save_file
from torchvision_stand_in import installed

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.errors import InputError
from tinyclip_jax.verify import inputs
from tinyclip_jax.zoo import FAMILY

with installed():
    import open_clip
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

TOLERANCE = 1e-4


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
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def outcome(config: dict[str, Any], folder: Path) -> str:
    """`right`, `wrong` with the error, or `refused` with the reason."""
    image, text = config["vision_cfg"], config["text_cfg"]
    elsewhere = {"visual.trunk.x": image.get("timm_model_name"), "text.transformer.x": text.get("hf_model_name")}
    if keys := [key for key, name in elsewhere.items() if name]:
        model, tensors = None, {key: torch.zeros(1) for key in keys}
    else:
        config = small(config)
        model = build(config)
        tensors = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    try:
        donor = open_donor(folder, [FAMILY])
    except InputError as error:
        return f"refused: {str(error).replace(str(folder), '').lstrip('/: ')}"
    assert model is not None, "opened without its tower"
    images, tokens = inputs(donor.cfg)
    params = {path: np.asarray(view, np.float32) for path, view in donor.source.values.items()}
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(donor.model.apply)(params, images, tokens)
    with torch.no_grad():
        theirs = [
            model.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2), normalize=True).numpy(),
            model.encode_text(torch.from_numpy(tokens).long(), normalize=True).numpy(),
        ]
    error = max(float(np.abs(np.asarray(a) - b).max()) for a, b in zip((ours.image, ours.text), theirs, strict=True))
    return "right" if error <= TOLERANCE else f"wrong: features differ by {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", type=Path, help="write the outcome of every name")
    args = parser.parse_args()
    configs = sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
    found: dict[str, str] = {}
    for file in configs:
        if args.only in file.stem:
            with tempfile.TemporaryDirectory() as folder:
                found[file.stem] = outcome(json.loads(file.read_text()), Path(folder))
    kinds = Counter(said.partition(":")[0] for said in found.values())
    reasons = Counter(said.removeprefix("refused: ") for said in found.values() if said.startswith("refused"))
    for name, said in found.items():
        if said.startswith("wrong"):
            print(f"{name}: {said}")
    for reason, count in reasons.most_common():
        print(f"{count:4} refused: {reason[:150]}")
    print(f"open_clip {open_clip.__version__}: {kinds['right']} right, {kinds['refused']} refused, {kinds['wrong']} wrong of {len(found)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(kinds["wrong"]))


if __name__ == "__main__":
    main()

"""Write tests/golden/vit: small ViTs of timm and transformers, with their logits (needs all three and torch).

    python scripts/make_vit_goldens.py

timm: with and without class token, both pool orders, distilled. transformers: ViT, DeiT with one head and with two.
Weights are drawn far from their initial values, so that a wrong activation, epsilon or order shows; eps are large
enough to be seen.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

# timm imports torchvision, whose compiled operators a CPU build of torch lacks: it needs only these two.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "vit"
SIZES: dict[str, Any] = dict(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2)
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm_cls": ("vit_tiny_patch16_224", {}),
    "timm_mean_norm": ("vit_tiny_patch16_224", dict(class_token=False, global_pool="avg")),
    "timm_norm_mean": ("vit_tiny_patch16_224", dict(class_token=False, global_pool="avg", fc_norm=False)),
    "timm_distilled": ("deit_tiny_distilled_patch16_224", {}),
}
HF = {
    "hf_vit": ViTForImageClassification,
    "hf_deit": DeiTForImageClassification,
    "hf_deit_teacher": DeiTForImageClassificationWithTeacher,
}
CLASSES = 5


def drawn(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
            if p.ndim == 1:
                p.add_(0.5)
    return model.eval()


def main() -> None:
    pictures = np.random.default_rng(0).standard_normal((3, 8, 8, 3)).astype(np.float32)
    x, logits = torch.from_numpy(pictures).permute(0, 3, 1, 2), {}
    for seed, (name, (architecture, args)) in enumerate(TIMM.items()):
        model = drawn(timm.create_model(architecture, num_classes=CLASSES, **SIZES, **args), seed)
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), FOLDER / name / "model.safetensors")
        about = dict(architecture=architecture, num_classes=CLASSES, num_features=16, model_args=SIZES | args)
        (FOLDER / name / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        with torch.no_grad():
            logits[name] = model(x).numpy()
    sizes = dict(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    for seed, (name, kind) in enumerate(HF.items()):
        config = (ViTConfig if name == "hf_vit" else DeiTConfig)(**sizes, layer_norm_eps=1e-3, num_labels=CLASSES)
        model = drawn(kind(config), 10 + seed)
        model.save_pretrained(FOLDER / name)
        with torch.no_grad():
            logits[name] = model(x).logits.numpy()
    np.savez(FOLDER / "expected.npz", pictures=pictures, **logits)


if __name__ == "__main__":
    main()

"""Write tests/golden/clip: small checkpoints of transformers and open_clip, and what those compute from them.

    pip install torch transformers && pip install --no-deps open-clip-torch==3.3.0 timm==1.0.31 torchvision==0.28.0
    python scripts/make_clip_goldens.py

Weights are drawn far from their tiny initial values, so that a wrong activation, epsilon, pooling or order of heads
shows.
"""

import json
from pathlib import Path

import numpy as np
import torch

# torchvision, which open_clip imports, is a CUDA build: on a CPU, its operators must be declared first.
torchvision = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    torchvision.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from open_clip.model import CLIP  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPConfig, CLIPModel  # noqa: E402

GOLDENS = Path(__file__).parent.parent / "tests" / "golden" / "clip"
SIZE, PATCH, VOCAB, CONTEXT, JOINT = 32, 8, 64, 12, 24

# (name, activation, eps, end-of-text id). Id 2 is the legacy value with which transformers pools at the largest id.
HF = (("hf_quick_gelu", "quick_gelu", 1e-5, 2), ("hf_gelu", "gelu", 1e-6, 40))


def main() -> None:
    for name, activation, eps, eos in HF:
        folder = GOLDENS / name
        model = randomised(CLIPModel(hf_config(activation, eps, eos)), seed=len(name))
        model.save_pretrained(folder)
        images, tokens = inputs(VOCAB - 1 if eos == 2 else eos)
        with torch.no_grad():
            out = model(pixel_values=pixels(images), input_ids=torch.from_numpy(tokens).long())
        save(folder, images, tokens, out.image_embeds, out.text_embeds, out.logits_per_image)
    open_clip_half()


def hf_config(activation: str, eps: float, eos: int) -> CLIPConfig:
    shared = dict(hidden_act=activation, layer_norm_eps=eps, projection_dim=JOINT)
    text = dict(hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB)
    text |= dict(max_position_embeddings=CONTEXT, eos_token_id=eos, bos_token_id=0, pad_token_id=1)
    image = dict(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return CLIPConfig(text_config=shared | text, vision_config=shared | image, projection_dim=JOINT)


def open_clip_half() -> None:
    """open_clip's classic layout, stored in half precision as on the hub."""
    vision = dict(image_size=SIZE, patch_size=PATCH, width=32, layers=2, head_width=8, mlp_ratio=3.0)
    text = dict(context_length=CONTEXT, vocab_size=VOCAB, width=16, heads=2, layers=3, mlp_ratio=3.0)
    model = randomised(CLIP(embed_dim=JOINT, vision_cfg=vision, text_cfg=text, quick_gelu=True), seed=3).half().float()
    folder = GOLDENS / "open_clip_f16"
    folder.mkdir(parents=True, exist_ok=True)
    halves = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(halves, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = dict(embed_dim=JOINT, quick_gelu=True, vision_cfg=vision, text_cfg=text)
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config), indent=2) + "\n")
    images, tokens = inputs(VOCAB - 1)
    with torch.no_grad():
        image, words, scale = model.eval()(pixels(images), torch.from_numpy(tokens).long())
    save(folder, images, tokens, image, words, scale * image @ words.T)


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter: matrices of gain 1.5, norm scales around one, everything else N(0, 0.2)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("logit_scale"):
                p.fill_(2.5)
            elif p.ndim >= 2 and "embedding" not in name:
                p.copy_(1.5 * noise * p[0].numel() ** -0.5)
            elif p.ndim == 1 and ("norm" in name or "layrnorm" in name or "ln_" in name) and name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise if p.ndim == 2 else 0.2 * noise)
    return model.eval()


def inputs(eot: int) -> tuple[np.ndarray, np.ndarray]:
    """Four pictures [4, 32, 32, 3] int8 (64ths), captions [4, 12] int32 with zeros, or the end again, at the end."""
    rng = np.random.default_rng(0)
    images = rng.integers(-128, 128, (4, SIZE, SIZE, 3)).astype(np.int8)
    tokens = np.zeros((4, CONTEXT), np.int32)
    for row, length, pad in zip(tokens, (3, 6, 9, CONTEXT), (0, eot, 0, 0), strict=True):
        words = rng.integers(3, VOCAB - 1, length - 1)
        row[:] = pad
        row[: length - 1] = np.where(words == eot, 5, words)
        row[length - 1] = eot
    return images, tokens


def pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / 64).permute(0, 3, 1, 2)


def save(
    folder: Path, images: np.ndarray, tokens: np.ndarray, image: torch.Tensor, text: torch.Tensor, logits: torch.Tensor
) -> None:
    outputs = dict(image=image.numpy(), text=text.numpy(), logits=logits.numpy())
    np.savez_compressed(folder / "expected.npz", images=images, tokens=tokens, **outputs)
    print(folder.name, f"{sum(f.stat().st_size for f in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()

"""Which of transformers' ViTs are read here, read right, and written back.

    python scripts/count_hf_vits.py --page docs/coverage.md            # needs the extra `parity`

Each class is built by transformers, small, with random weights in which a wrong setting shows: no norm, bias or factor
of LayerScale is 0 or 1. It is saved with `save_pretrained` and converted to a folder of heirloom and back, both
verified by transformers. The table has the largest error of the two, relative to the largest output.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from counting import insert

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.files import read_json
from learngene.zoo import FAMILY

SIZES: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4)
VIT = SIZES | dict(intermediate_size=24, layer_norm_eps=1e-3)
DINO = SIZES | dict(mlp_ratio=2, layer_norm_eps=1e-3)
MAE = VIT | dict(decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
MAE |= dict(decoder_intermediate_size=16)
CLASSES = dict(num_labels=5)
BOTH = CLASSES | dict(vision_config=VIT, text_config=dict(hidden_size=16, num_attention_heads=2, vocab_size=64))
# The class, its config, and further arguments of the class.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViT", VIT),
    "ViTModel without its pooler": ("ViT", VIT | dict(hidden_act="gelu_new")),
    "ViTModel without biases of queries, keys and values": ("ViT", VIT | dict(qkv_bias=False)),
    "ViTForImageClassification": ("ViT", VIT | CLASSES | dict(hidden_act="quick_gelu")),
    "DeiTModel": ("DeiT", VIT),
    "DeiTForImageClassification": ("DeiT", VIT | CLASSES),
    "DeiTForImageClassificationWithTeacher": ("DeiT", VIT | CLASSES),
    "Dinov2Model": ("Dinov2", DINO),
    "Dinov2Model with SwiGLU": ("Dinov2", DINO | dict(use_swiglu_ffn=True, qkv_bias=False)),
    "Dinov2ForImageClassification": ("Dinov2", DINO | CLASSES | dict(layerscale_value=0.1)),
    "Dinov2WithRegistersModel": ("Dinov2WithRegisters", DINO | dict(num_register_tokens=3)),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegisters", DINO | CLASSES | dict(use_swiglu_ffn=True)),
    "SiglipVisionModel": ("SiglipVision", VIT),
    "CLIPVisionModel": ("CLIPVision", VIT | dict(hidden_act="gelu")),
    "CLIPVisionModelWithProjection": ("CLIPVision", VIT | dict(projection_dim=12)),
    "SiglipForImageClassification": ("Siglip", BOTH),
    "CLIPForImageClassification": ("CLIP", BOTH),
    "ViTMAEModel": ("ViTMAE", MAE),
    "ViTMAEForPreTraining": ("ViTMAE", MAE),
}
ONLY_READ = ("SiglipForImageClassification", "CLIPForImageClassification")


def save(case: str, folder: Path) -> torch.nn.Module:
    """Build a case with random weights, save it as transformers does, and return it."""
    config, fields = CASES[case]
    kind = getattr(transformers, case.split()[0])
    how = dict(add_pooling_layer=False) if case.endswith("without its pooler") else {}
    model = kind(getattr(transformers, f"{config}Config")(**fields), **how)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            table = any(part in name for part in ("token", "position", "class_embedding", "probe"))
            scale = 0.5 if table else 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (0.5 if p.ndim == 1 and not table else 0))
    model.eval().save_pretrained(folder)
    return model


def row(case: str, folder: Path) -> str:
    """A line of the table. Raises VerificationError where outputs differ."""
    save(case, folder / "theirs")
    there = convert(open_donor(folder / "theirs", [FAMILY]), folder / "ours", "heirloom")
    back, written = there, "not written"
    if case not in ONLY_READ:
        back = convert(open_donor(folder / "ours", [FAMILY]), folder / "back", "hf")
        written = f"`{read_json(folder / 'back' / 'config.json')['architectures'][0]}`"
    for check in (there, back):
        assert check.reference == "transformers" and check.max_error is not None, check.sentence()
    error = max(there.max_error or 0, back.max_error or 0)
    name, _, variant = case.partition(" ")
    return f"| `{name}`{f' {variant}' if variant else ''} | {written} | {error:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="write the table into this page, such as docs/coverage.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(case, Path(folder)))
            print(rows[-1], flush=True)
    if args.page:
        head = "| read | written back as | largest error |\n|---|---|---|"
        insert(args.page, "transformers", f"transformers {transformers.__version__}:\n\n{head}\n" + "\n".join(rows))


if __name__ == "__main__":
    main()

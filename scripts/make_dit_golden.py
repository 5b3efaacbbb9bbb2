"""Write tests/golden/dit: a small DiT of diffusers, and what its own class predicts (needs torch, diffusers).

    python scripts/make_dit_golden.py

Weights are drawn far from their initial values: a fresh DiT predicts 0 whatever its input.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "dit"


def main() -> None:
    torch.manual_seed(0)
    sizes = dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    model = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=6).eval()
    embedders = model.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1 if p.ndim == 1 else p.shape[1] ** -0.5)
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(embedders.state_dict())
    model.save_pretrained(FOLDER)
    # The eps of the config is that of one norm of each block; at 0.1 it cannot be overlooked.
    wide = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=6, norm_eps=0.1).eval()
    wide.load_state_dict(model.state_dict())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 8, 4)).astype(np.float32)
    t, labels = np.array([0, 17, 903], np.int32), np.array([2, 6, 0], np.int32)
    images, times, classes = (
        torch.from_numpy(x).permute(0, 3, 1, 2),
        torch.from_numpy(t).long(),
        torch.from_numpy(labels).long(),
    )
    with torch.no_grad():
        outputs = [
            m(images, timestep=times, class_labels=classes).sample.permute(0, 2, 3, 1).numpy() for m in (model, wide)
        ]
    np.savez(FOLDER / "outputs.npz", x=x, t=t, labels=labels, prediction=outputs[0], prediction_eps=outputs[1])


if __name__ == "__main__":
    main()

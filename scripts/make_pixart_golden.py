"""Write tests/golden/pixart: a small PixArt-Sigma as diffusers saves it, and what its own class predicts (needs torch
and diffusers).

    python scripts/make_pixart_golden.py

Weights are drawn far from their initial values, tables too. The latents are no squares, and the masks have different
lengths.
"""

from math import sqrt
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "pixart"


def main() -> None:
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, sample_size=8)
    conditions = dict(caption_channels=12, interpolation_scale=0.5, use_additional_conditions=False)
    model = PixArtTransformer2DModel(**sizes, **conditions).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3 if p.ndim == 1 else 1 / sqrt(p[0].numel()))
    model.save_pretrained(FOLDER)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 12, 4)).astype(np.float32)
    t = np.array([0.0, 17.5, 903.0], np.float32)
    text = rng.standard_normal((3, 7, 12)).astype(np.float32)
    mask = np.arange(7) < np.array([[1], [4], [7]])
    images, times, texts, masks = (torch.from_numpy(a) for a in (x.transpose(0, 3, 1, 2), t, text, mask))
    with torch.no_grad():
        drawn = model(images, encoder_hidden_states=texts, timestep=times, encoder_attention_mask=masks.long()).sample
    prediction = drawn.permute(0, 2, 3, 1).numpy()
    np.savez(FOLDER / "outputs.npz", x=x, t=t, text=text, mask=mask, prediction=prediction)


if __name__ == "__main__":
    main()

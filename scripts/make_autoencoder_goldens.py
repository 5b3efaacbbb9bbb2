"""Write tests/golden/autoencoder: a small AutoencoderKL as diffusers saves it, with what diffusers computes from it.

    pip install -c constraints.txt -e '.[parity]'
    python scripts/make_autoencoder_goldens.py

Weights are drawn far from their tiny initial values, so that a wrong epsilon, padding or order of groups shows. The
pictures have an odd height and width: at every step down a row or a column is left over.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

FOLDER = Path(__file__).parent.parent / "tests" / "golden" / "autoencoder"
CHANNELS = (4, 8, 8)


def main() -> None:
    levels = len(CHANNELS)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    model = AutoencoderKL(block_out_channels=CHANNELS, layers_per_block=2, norm_num_groups=2, sample_size=40, **blocks)
    randomise(model, torch.Generator().manual_seed(0))
    model.eval().save_pretrained(FOLDER)
    images = np.random.default_rng(0).integers(-128, 128, (2, 41, 55, 3)).astype(np.int8)
    latents = np.random.default_rng(1).integers(-128, 128, (2, 7, 5, 4)).astype(np.int8)
    with torch.no_grad():
        posterior = model.encode(nchw(images)).latent_dist
        decoded = model.decode(nchw(latents)).sample
    outputs = dict(mean=posterior.mean, logvar=posterior.logvar, decoded=decoded)
    arrays = {name: value.permute(0, 2, 3, 1).numpy() for name, value in outputs.items()}
    np.savez_compressed(FOLDER / "expected.npz", images=images, latents=latents, **arrays)
    print(f"{sum(f.stat().st_size for f in FOLDER.iterdir()):,} bytes")


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter: kernels of gain 1.5, norm scales around one, biases N(0, 0.2), some logvars clipped."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                p.copy_(1.5 * noise * p[0].numel() ** -0.5)
            else:
                p.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
        model.quant_conv.weight[4:] *= 12


def nchw(values: np.ndarray) -> torch.Tensor:
    """64ths to f32, channels first."""
    return torch.from_numpy(values.astype(np.float32) / 64).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()

"""Writes tests/golden/bicubic.npz: torch's bicubic resampling of a small grid, up and down (needs torch).

python scripts/make_bicubic_golden.py
"""

from pathlib import Path

import numpy as np
import torch


def resized(grid: np.ndarray, side: int) -> np.ndarray:
    x = torch.from_numpy(grid).permute(2, 0, 1)[None]
    return (
        torch.nn.functional.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)[0]
        .permute(1, 2, 0)
        .numpy()
    )


if __name__ == "__main__":
    grid = np.random.default_rng(0).standard_normal((7, 7, 3)).astype(np.float32)
    out = Path(__file__).parents[1] / "tests" / "golden" / "bicubic.npz"
    np.savez_compressed(out, input=grid, up=resized(grid, 12), down=resized(grid, 5))

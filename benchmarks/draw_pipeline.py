"""A whole PixArt-Σ pipeline of random weights at full size: what memory and time are measured on without the real one.

    python benchmarks/draw_pipeline.py big/sigma --tokenizer TOKENIZER_FOLDER     # 12.3 GB of disk, three minutes

Writes transformer (610,856,096 parameters), autoencoder and T5-XXL in the format and the file layout of the public
`PixArtSigmaPipeline` folders: the transformer in float32, the text encoder in bfloat16 shards. Sizes are flags, for a
smaller one.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.t5_memory import write_encoder
from heirloom.common.checkpoint.family import Family
from heirloom.common.checkpoint.weights import create_safetensors
from heirloom.common.files import write_json
from heirloom.common.nn.functional import functional
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.pixart import PixArtConfig, published_interpolation
from lit_jax.text.t5 import t5
from lit_jax.zoo import AUTOENCODERS, PIXART

SCHEDULER = dict(
    _class_name="DPMSolverMultistepScheduler", num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02,
    beta_schedule="linear", prediction_type="epsilon", algorithm_type="dpmsolver++", solver_order=2,
    solver_type="midpoint", timestep_spacing="linspace", final_sigmas_type="zero", lower_order_final=True,
)  # fmt: skip
CLASSES = dict(
    transformer=["diffusers", "PixArtTransformer2DModel"], vae=["diffusers", "AutoencoderKL"],
    text_encoder=["transformers", "T5EncoderModel"], tokenizer=["transformers", "T5Tokenizer"],
    scheduler=["diffusers", "DPMSolverMultistepScheduler"],
)  # fmt: skip


def write_random(family: Family, cfg: Any, folder: Path, seed: int) -> None:
    """Writes a model of random weights in diffusers' format: N(0, 1 / inputs) for matrices, near 1 or 0 for vectors."""
    format, spec, rng = family.format("diffusers"), functional(family.module, cfg).spec, np.random.default_rng(seed)
    folder.mkdir(parents=True)
    format.write_config(cfg, folder)
    with create_safetensors(folder / format.file, format.layout_of(cfg).foreign(spec)) as out:
        embedders: dict[str, np.ndarray] = {}
        for key, value in out.items():
            if "table" in key:
                value[...] = 0.02 * rng.standard_normal(value.shape, np.float32)
            elif value.ndim == 1:
                value[...] = 0.02 * rng.standard_normal(value.shape, np.float32) + ("norm" in key and "weight" in key)
            else:
                std = np.prod(value.shape[1:]) ** -0.5
                value[...] = std * rng.standard_normal(value.shape, np.float32)
            if ".norm1.emb." in key:  # each block of a DiT has a copy of the embedders
                value[...] = embedders.setdefault(key.partition(".norm1.")[2], np.array(value))


def write_pipeline(folder: Path, cfg: PixArtConfig, text: str, tokenizer: Path) -> None:
    """Writes the whole folder. text: size of the T5."""
    write_random(PIXART, cfg, folder / "transformer", 0)
    write_random(AUTOENCODERS, AutoencoderConfig(scaling_factor=0.13025, size=1024), folder / "vae", 1)
    write_encoder(t5(text), folder, tokenizer)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", {"_class_name": "PixArtSigmaPipeline"} | CLASSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a T5 tokenizer")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--text", default="xxl", help="small, base, large, xl or xxl")
    args = parser.parse_args()
    size = args.pixels // 8
    sizes = dict(size=size, layers=args.layers, text_width=t5(args.text).width)
    cfg = PixArtConfig(**sizes, interpolation=published_interpolation(size))
    write_pipeline(args.folder, cfg, args.text, args.tokenizer)


if __name__ == "__main__":
    main()

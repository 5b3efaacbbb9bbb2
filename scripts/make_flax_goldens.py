"""Write tests/golden/flax: small checkpoints of the Flax models that transformers and diffusers had, and their outputs.

Both libraries dropped Flax, so this runs in an environment of its own (Python 3.11):

    pip install transformers==4.44.2 diffusers==0.30.3 jax==0.4.30 jaxlib==0.4.30 flax==0.8.5 'numpy<2' 'scipy<1.14' \
        'huggingface_hub<0.26' 'orbax-checkpoint<0.6'
    python scripts/make_flax_goldens.py

Weights are drawn far from their tiny initial values, so that a wrong activation, epsilon, order or transposition shows.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from diffusers import FlaxAutoencoderKL
from transformers import CLIPConfig, FlaxCLIPModel, FlaxViTForImageClassification, ViTConfig

GOLDENS = Path(__file__).parents[1] / "tests" / "golden" / "flax"
CONTEXT, VOCAB = 12, 64


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    clip()
    vit()
    autoencoder()
    for folder in sorted(GOLDENS.iterdir()):
        print(folder.name, f"{sum(f.stat().st_size for f in folder.iterdir()):,} bytes")


def clip() -> None:
    shared = dict(hidden_act="quick_gelu", layer_norm_eps=1e-3, projection_dim=24)
    text = dict(hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB)
    text |= dict(max_position_embeddings=CONTEXT, eos_token_id=40, bos_token_id=0, pad_token_id=1)
    image = dict(hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    image |= dict(image_size=32, patch_size=8)
    model = FlaxCLIPModel(CLIPConfig(text_config=shared | text, vision_config=shared | image, projection_dim=24))
    params = drawn(model.params, 0)
    model.save_pretrained(GOLDENS / "clip", params=params)
    rng = np.random.default_rng(0)
    images, tokens = rng.integers(-128, 128, (3, 32, 32, 3)).astype(np.int8), np.zeros((3, CONTEXT), np.int32)
    for row, length in zip(tokens, (3, 7, CONTEXT), strict=True):
        row[: length - 1], row[length - 1] = rng.integers(41, VOCAB, length - 1), 40
    out = model(input_ids=tokens, pixel_values=nchw(images), params=params)
    outputs = dict(image=out.image_embeds, text=out.text_embeds, logits=out.logits_per_image)
    save("clip", images=images, tokens=tokens, **outputs)


def vit() -> None:
    sizes = dict(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = FlaxViTForImageClassification(
        ViTConfig(**sizes, intermediate_size=32, layer_norm_eps=1e-3, num_labels=5)
    )
    params = drawn(model.params, 1)
    model.save_pretrained(GOLDENS / "vit", params=params)
    images = np.random.default_rng(0).integers(-128, 128, (3, 8, 8, 3)).astype(np.int8)
    save("vit", images=images, logits=model(nchw(images), params=params).logits)


def autoencoder() -> None:
    """The pictures have an odd height and width: at every step down a row or a column is left over."""
    levels = 3
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    sizes = dict(block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=2, sample_size=40)
    model = FlaxAutoencoderKL(**sizes, **blocks)
    params = drawn(model.init_weights(jax.random.key(0)), 2)
    model.save_pretrained(GOLDENS / "autoencoder", params=params)
    images = np.random.default_rng(0).integers(-128, 128, (2, 41, 55, 3)).astype(np.int8)
    latents = np.random.default_rng(1).integers(-128, 128, (2, 7, 5, 4)).astype(np.int8)
    moments = model.apply({"params": params}, nchw(images), method=model.encode).latent_dist
    decoded = model.apply({"params": params}, nchw(latents), method=model.decode).sample
    outputs = dict(mean=moments.mean, logvar=moments.logvar, decoded=decoded.transpose(0, 2, 3, 1))
    save("autoencoder", images=images, latents=latents, **outputs)


def drawn(params: Any, seed: int) -> Any:
    """Kernels of gain 1.5, norm scales around one, everything else N(0, 0.2) or, of tables, N(0, 1)."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, value: Any) -> np.ndarray:
        leaf, noise = path[-1].key, rng.standard_normal(value.shape).astype(np.float32)
        if leaf == "kernel":
            return np.float32(1.5 * np.prod(value.shape[:-1]) ** -0.5) * noise
        if leaf == "logit_scale":
            return np.float32(2.5) * np.ones_like(noise)
        return noise if value.ndim >= 2 else np.float32(0.2) * noise + np.float32(leaf == "scale")

    return jax.tree_util.tree_map_with_path(draw, params)


def nchw(images: np.ndarray) -> np.ndarray:
    """64ths to f32, channels first, as both libraries take them."""
    return (images.astype(np.float32) / 64).transpose(0, 3, 1, 2)


def save(name: str, **arrays: Any) -> None:
    np.savez_compressed(GOLDENS / name / "expected.npz", **{key: np.asarray(value) for key, value in arrays.items()})


if __name__ == "__main__":
    main()

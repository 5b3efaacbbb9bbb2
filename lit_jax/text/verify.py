"""Compares our T5 encoder with transformers', which reads the same folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.quantized import stored_layer
from heirloom.common.checkpoint.verify import Check, against, as_folder, compare, outputs, quiet
from heirloom.common.nn.functional import functional
from lit_jax.text.t5 import T5Block, T5Config, T5Encoder, attention_bias

LARGE = 1e9  # parameters; of a larger encoder the first layers are compared, as it is in memory twice in f32
FIRST_LAYERS = 2
FILE = "model.safetensors"


def inputs(cfg: T5Config) -> tuple[np.ndarray, np.ndarray]:
    """Makes two seeded rows of 24 tokens and their mask; the second has 11 tokens and padding."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocabulary, (2, 24), dtype=np.int32)
    return tokens, np.arange(24) < np.array([[24], [11]])


def verify(cfg: T5Config, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Compares features, f32 at highest precision, with transformers' T5EncoderModel; tolerance 1e-4 relative.

    Of an encoder above 1e9 parameters the first two layers are compared with the final norm, and the note says so:
    transformers reads the file with `num_layers` 2, and every layer is compared bit for bit after writing anyway.
    Without torch and transformers only finiteness can be checked: `reference` is None, and the note says so.
    """
    tokens, mask = inputs(cfg)
    size = sum(leaf.count for leaf in functional(T5Encoder, cfg).spec.values())
    layers = cfg.layers if size <= LARGE else min(FIRST_LAYERS, cfg.layers)
    model = functional(T5Encoder, replace(cfg, layers=layers))
    first = {path: _first(value, layers) if path.startswith("blocks/") else value for path, value in params.items()}
    mine = [outputs(model.apply, first, tokens, mask)[0][mask]]
    libraries = ("torch", "transformers")

    def reference() -> Check:
        theirs = [_transformers(file, tokens, mask, layers)[mask]]
        check = compare(mine, theirs, reference="transformers", libraries=libraries)
        note = "" if layers == cfg.layers else f"the first {layers} of {cfg.layers} layers and the final norm"
        return replace(check, note=check.note or note)

    missing = "torch and transformers are not installed"
    return against(reference, mine, format, what="features", needs=libraries, missing=missing)


def features(cfg: T5Config, params: Mapping[str, Any]) -> list[np.ndarray]:
    """Computes the features of the inputs, [35, width] f32, one layer at a time: no other is in memory in f32."""
    tokens, mask = inputs(cfg)
    x = np.asarray(params["embed/table"], np.float32)[tokens]
    bias = attention_bias(cfg, jnp.asarray(np.asarray(params["position/table"], np.float32)), jnp.asarray(mask))
    blocks = {path.removeprefix("blocks/"): value for path, value in params.items() if path.startswith("blocks/")}
    block = functional(T5Block, cfg).apply
    for i in range(cfg.layers):
        (x,) = outputs(block, {path: stored_layer(value, i) for path, value in blocks.items()}, x, np.asarray(bias))
    scale = np.asarray(params["norm/scale"], np.float32)
    return [(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + cfg.eps) * scale)[mask]]


def _first(value: Any, layers: int) -> Any:
    """Returns the first layers of a stacked leaf, without reading the others."""
    return np.stack([value.layer(i) for i in range(layers)]) if hasattr(value, "layer") else value[:layers]


def _transformers(file: Path, tokens: np.ndarray, mask: np.ndarray, layers: int) -> np.ndarray:
    """Computes features with transformers, which reads the file and its config itself."""
    import torch
    import transformers

    shown = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # no table of the layers or the decoder that it leaves out
    with as_folder(file, FILE) as folder, quiet():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        config.num_layers = layers
        kind = transformers.T5EncoderModel
        model = kind.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True).eval()
    transformers.logging.set_verbosity(shown)
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())
    return out.last_hidden_state.numpy()

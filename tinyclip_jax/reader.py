"""CLIP's text tower as a text encoder of other models: the state of every token, not of the whole caption."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from heirloom.common.checkpoint.family import Donor, TextReader
from heirloom.common.errors import InputError, remark
from heirloom.common.evaluate.features import embedder
from heirloom.common.mesh import start
from heirloom.common.train.parameters import load_params
from tinyclip_jax.inputs import tokenizer_of
from tinyclip_jax.model import ClipConfig

BATCH = 64  # texts at a time


def text_reader(donor: Donor, tokens: int) -> TextReader:
    """Open a CLIP to read texts of up to `tokens` tokens, start and end included.

    Raises InputError for a CLIP that reads fewer. A longer text is cut before its end token, and a remark says so.
    """
    cfg: ClipConfig = donor.cfg
    if tokens > cfg.text.context:
        least = f"takes at most {cfg.text.context} tokens, the model asks for {tokens}"
        raise InputError(f"{donor.path} {least}: set text_tokens to {cfg.text.context} or fewer")
    if (tokenizer := tokenizer_of(donor)) is None:
        raise InputError(f"{donor.path} has no tokenizer: put its tokenizer.json next to the weights")
    mesh = start()
    params, read = load_params(donor, mesh), embedder(partial(donor.model.apply, method="token_states"), mesh, BATCH)

    def states(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = tokenizer(texts, tokens)
        longer = tokenizer(texts, tokens + 1)
        if cut := [text for text, row in zip(texts, longer, strict=True) if tokenizer.eot not in row[:tokens]]:
            remark(f"a text longer than {tokens} tokens is cut: {cut[0][:60]!r} ({len(cut)} in all)")
        ends = (ids == tokenizer.eot).argmax(1)
        # A tower that is not causal sees its padding, so it gets as much as in training.
        padding = 0 if cfg.text.causal else cfg.text.context - tokens
        padded = np.pad(ids, ((0, 0), (0, padding)), constant_values=tokenizer.pad)
        parts = [read(params, padded[i : i + BATCH])[:, :tokens] for i in range(0, len(ids), BATCH)]
        return np.concatenate(parts), np.arange(tokens) <= ends[:, None]

    return TextReader(cfg.text.width, states)

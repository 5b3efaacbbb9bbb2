"""Tokenizers of SentencePiece's pieces with padding of their own: SigLIP, SigLIP 2, MetaCLIP 2."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, models

from heirloom.common.data.text import clean, strings
from heirloom.common.errors import InputError
from heirloom.common.files import write_json

REPAIR = "repair_text"  # field of tokenizer_config.json: `PieceTokenizer.repair`
PROBE = "a photo of a cat"


class PieceTokenizer:
    """Converts strings to ids: a start token where the model has one, the pieces of the text, the end token, padding.

    Cleaning, vocabulary, start, end and padding are those of a tokenizer.json, and the library `tokenizers` runs them.
    Deviation: the name of a special token in a caption, such as "</s>", is tokenised like any other text, so no caption
    can end early.
    """

    def __init__(self, pipeline: tokenizers.Tokenizer, pad: int, repair: bool = False):
        """pad: id of padding. repair: mojibake and HTML entities are resolved first, as open_clip does.

        Raises InputError when `pipeline` has no end token.
        """
        pipeline.no_padding()
        pipeline.no_truncation()
        self.pad, self.repair = pad, repair
        bare, whole = (pipeline.encode(PROBE, add_special_tokens=special).ids for special in (False, True))
        starts = len(whole) - len(bare) - 1
        if starts not in (0, 1) or whole[starts:-1] != bare or not bare:
            around = f"{PROBE!r} becomes {whole}, without special tokens {bare}"
            needed = "does not end a text with one token, after at most one at its start"
            raise InputError(f"this tokenizer {needed}: {around}")
        self.starts, self.eot = whole[:starts], whole[-1]
        vocab, added = pipeline.get_vocab(), pipeline.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        self.vocab_size = max([i for i in vocab.values() if i not in special] + [*self.starts, self.eot, pad]) + 1
        """One more than the largest id that a caption can get."""
        self.largest_word = max((i for i in vocab.values() if i not in added), default=-1)
        """Largest id among the tokens that were not added."""
        self._pipeline = pipeline
        self._encoder = _without_special(pipeline, special)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token."""
        return self._pipeline.get_vocab()

    def __reduce__(self) -> tuple[Any, ...]:
        return PieceTokenizer, (self._pipeline, self.pad, self.repair)  # pickling loses `encode_special_tokens`

    def __call__(self, texts: str | Iterable[str], context: int) -> np.ndarray:
        """Returns ids, int32 [n, context] (n = 1 for a string): cut to `context` with the end token last."""
        room = context - len(self.starts) - 1
        if room < 1:
            raise InputError(f"context {context} is too small: a caption needs at least one token, and those around it")
        texts = strings(texts)
        if self.repair:
            texts = [clean(text, lower=False) for text in texts]
        out = np.full((len(texts), context), self.pad, np.int32)
        found = self._encoder.encode_batch(texts, add_special_tokens=False)
        for row, encoding in zip(out, found, strict=True):
            ids = [*self.starts, *encoding.ids[:room], self.eot]
            row[: len(ids)] = ids
        return out

    def save(self, folder: str | Path) -> Path:
        """Writes `folder`/tokenizer.json, which has padding too; with `repair`, also tokenizer_config.json."""
        file = Path(folder) / "tokenizer.json"
        self._pipeline.enable_padding(pad_id=self.pad, pad_token=self.name(self.pad))
        try:
            self._pipeline.save(str(file))
        finally:
            self._pipeline.no_padding()
        if self.repair:
            write_json(file.with_name("tokenizer_config.json"), {REPAIR: True})
        return file

    def for_transformers(self, context: int) -> dict[str, Any]:
        """Returns the tokenizer_config.json with which transformers runs the tokenizer.json as it is."""
        about: dict[str, Any] = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=context)
        about |= dict(eos_token=self.name(self.eot), pad_token=self.name(self.pad), padding_side="right")
        about |= dict(bos_token=self.name(self.starts[0])) if self.starts else {}
        # Without a mask, transformers' text towers see the padding, as they did in training.
        return about | dict(model_input_names=["input_ids"]) | ({REPAIR: True} if self.repair else {})

    def name(self, token: int) -> str:
        """Returns a token as a string."""
        return str(self._pipeline.id_to_token(token))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of one row up to the end token, cleaned as the tokenizer cleans."""
        row = [int(i) for i in ids][len(self.starts) :]
        return self._pipeline.decode(row[: row.index(self.eot) if self.eot in row else len(row)]).strip()


def _without_special(pipeline: tokenizers.Tokenizer, special: set[int]) -> tokenizers.Tokenizer:
    """Returns a tokenizer with the same ids that finds no special tokens in a text.

    A unigram model finds any entry of its vocabulary, so there the special ones get names that no caption has.
    """
    encoder = pipeline
    if isinstance(pipeline.model, models.Unigram):
        model = json.loads(pipeline.to_str())["model"]
        pieces = [(f"\0{i}\0" if i in special else piece, score) for i, (piece, score) in enumerate(model["vocab"])]
        unknown, fallback = model["unk_id"], bool(model.get("byte_fallback"))
        encoder = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback))
        for part in ("normalizer", "pre_tokenizer"):
            if (step := getattr(pipeline, part)) is not None:
                setattr(encoder, part, step)
        for i, token in sorted(pipeline.get_added_tokens_decoder().items()):
            if not token.special:
                encoder.add_tokens([token])
            elif i >= len(pieces):  # keeps the ids of the tokens after it
                encoder.add_special_tokens([AddedToken(token.content, special=True, normalized=False)])
    encoder.encode_special_tokens = True
    return encoder

"""Encodes prompts with a T5 whose weights stay in their files: in memory is one layer, and the next one.

encoder = open_text("PixArt-Sigma", tokens=300)
features, mask = encoder.encode(["a red fox in the snow", ""])
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.checkpoint.weights import is_folder, of_run
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.methods import families
from heirloom.common.nn.functional import functional
from heirloom.common.nn.norm import RmsNorm
from heirloom.common.surgery.layout import release
from lit_jax.text.cache import FeatureCache
from lit_jax.text.layers import Layer, Layers
from lit_jax.text.layouts import FAMILY
from lit_jax.text.t5 import T5Block, T5Config, attention_bias
from lit_jax.text.tokenizer import T5Tokenizer, find_tokenizer

TOKENS = 300  # of a prompt in PixArt-Sigma
MULTIPLE = 32  # lengths are rounded up to a multiple, so that few are compiled
AT_ONCE = 1024  # tokens of the prompts that go through a layer together

Progress = Callable[[int, int], object]
"""`progress(done, total)` is called after each layer, with the numbers of layers."""


class TextFeatures(NamedTuple):
    """features: [n, tokens, width] f32, zeros at padding. mask: [n, tokens] bool, false for padding."""

    features: np.ndarray
    mask: np.ndarray


def open_text(
    source: str | Path,
    *,
    tokens: int = TOKENS,
    resident: bool = False,
    cache: Path | None = None,
    tokenizer: Path | None = None,
) -> "TextEncoder | TowerEncoder":
    """Opens a text encoder and its tokenizer; the weights are opened by the first prompt that is not in the cache.

    source: a T5 of ours or of transformers, folder or file, or the folder of a pipeline with `text_encoder/` and
    `tokenizer/`; or a run or weights folder of ours whose family can read texts, such as a CLIP. tokens: length of the
    features. resident: keep the weights in memory, in the dtype of the file, for many calls. cache: a folder that keeps
    features, made when needed. tokenizer: its folder, if it is not that of the pipeline or of the encoder. Raises
    InputError for a source or tokenizer that does not exist or cannot be read.
    """
    path = of_run(Path(source))
    if (path / "text_encoder").is_dir() and not is_folder(path):
        path = path / "text_encoder"
    if not path.exists():
        raise InputError(f"{source} does not exist; give the folder of a text encoder, or of a pipeline with one")
    if is_folder(path) and (tower := _tower(path)):
        return TowerEncoder(open_donor(path, [tower]), tokens)
    folder = path if path.is_dir() else path.parent
    words = tokenizer or find_tokenizer(folder)
    if words is None:
        raise InputError(
            f"{folder} has no tokenizer (tokenizer.json or spiece.model), nor has a folder 'tokenizer' next to it:"
            " name the folder that has"
        )
    features = None if cache is None else FeatureCache(Path(cache), path)
    return TextEncoder(path, T5Tokenizer.load(words), tokens, resident=resident, cache=features)


def _tower(folder: Path) -> Family | None:
    """Returns the family of a weights folder of ours if it reads texts for other models."""
    name = read_json(folder / "config.json").get("method")
    return next((family for family in families() if family.name == name and family.reader), None)


class TowerEncoder:
    """A text encoder of another family, such as the text tower of a CLIP; it is small, and stays in memory."""

    layers = 1  # steps of its progress

    def __init__(self, donor: Donor, tokens: int):
        assert donor.family.reader
        self.path, self.tokens, self._reader = donor.path, tokens, donor.family.reader(donor, tokens)

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self._reader.width

    def encode(
        self, prompts: Sequence[str], progress: Progress | None = None, *, padding: Sequence[str] = ()
    ) -> TextFeatures:
        """Returns the features of prompts; they are zeros where the mask is false, but for the prompts of `padding`."""
        features, mask = self._reader.read(prompts)
        kept = mask | np.array([[prompt in padding] for prompt in prompts])
        if progress is not None:
            progress(1, 1)
        return TextFeatures(np.where(kept[..., None], features, np.float32(0)), mask)


class Row(NamedTuple):
    """Ids of one prompt; the first `real` of them count, the others are padding."""

    ids: tuple[int, ...]
    real: int


class TextEncoder:
    """A T5 encoder with its tokenizer. tokens: length of the features of a prompt."""

    def __init__(self, path: Path, tokenizer: T5Tokenizer, tokens: int, *, resident: bool, cache: FeatureCache | None):
        self.path, self.tokenizer, self.tokens = path, tokenizer, tokens
        self._resident, self._cache = resident, cache
        self._kept: list[Layer] = []

    def encode(
        self, prompts: Sequence[str], progress: Progress | None = None, *, padding: Sequence[str] = ()
    ) -> TextFeatures:
        """Returns the features of prompts; one that is too long is cut, and a remark says so.

        Only as many tokens as a prompt has are computed, rounded up to a multiple of 32; the features of padding, which
        a mask hides, are zeros but for the prompts of `padding`. Deviation: transformers always computes them. Raises
        InputError for features that are not finite.
        """
        ids, mask = self.tokenizer(prompts, self.tokens)
        keys = [
            Row(tuple((row if prompt in padding else row[real]).tolist()), int(real.sum()))
            for prompt, row, real in zip(prompts, ids, mask, strict=True)
        ]
        rows = dict.fromkeys(keys)  # each prompt once
        found: dict[Row, np.ndarray] = {}
        if self._cache is not None:
            found = {row: hit for row in rows if (hit := self._cache.get(row.ids)) is not None}
        if missing := [row for row in rows if row not in found]:
            for row, features in zip(missing, self._compute(missing, progress), strict=True):
                if not np.isfinite(features).all():
                    raise InputError(
                        f"text encoder: the features of {self.tokenizer.decode(row.ids)[:60]!r} are not finite;"
                        f" {self.path} is damaged or in a dtype that overflows: take a bfloat16 or float32 file"
                    )
                found[row] = features
                if self._cache is not None:
                    self._cache.put(row.ids, features)
        width = next(iter(found.values())).shape[-1] if found else self.cfg.width
        out = np.zeros((*mask.shape, width), np.float32)
        for features, row in zip(out, keys, strict=True):
            features[: len(row.ids)] = found[row]
        return TextFeatures(out, mask)

    @property
    def cfg(self) -> T5Config:
        """The config of the encoder; opens its weights."""
        return self._donor.cfg

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.cfg.width

    @property
    def layers(self) -> int:
        return self.cfg.layers

    @cached_property
    def _donor(self) -> Donor:
        donor = open_donor(self.path, [FAMILY])
        if self.tokenizer.vocabulary > donor.cfg.vocabulary:
            raise InputError(
                f"{self.path} has {donor.cfg.vocabulary} tokens, and its tokenizer {self.tokenizer.vocabulary}: they do"
                " not belong together; name the folder of its tokenizer"
            )
        return donor

    def _compute(self, rows: Sequence[Row], progress: Progress | None) -> list[np.ndarray]:
        """Returns the features of rows, [len(row.ids), width] each."""
        groups = list(_groups(rows, self.tokens))
        states = [self._embed([rows[i] for i in group], length) for group, length in groups]
        for done, layer in enumerate(self._parameters(), 1):
            states = [(self._block(layer, self._positions, x, mask), mask) for x, mask in states]
            jax.block_until_ready(states)  # before the next layer takes the place of this one
            if progress is not None:
                progress(done, self.cfg.layers)
        out: list[Any] = [None] * len(rows)
        for (group, _), (x, _) in zip(groups, states, strict=True):
            for i, features in zip(group, np.asarray(self._norm(x)), strict=True):
                out[i] = features[: len(rows[i].ids)]
        return out

    def _embed(self, rows: Sequence[Row], length: int) -> tuple[jax.Array, jax.Array]:
        """Returns the input of the first layer and its mask; only the rows of these tokens are read from the table."""
        ids = np.zeros((len(rows), length), np.int32)
        for out, row in zip(ids, rows, strict=True):
            out[: len(row.ids)] = row.ids
        (table,) = self._donor.source.values["embed/table"].parts
        embedded = np.asarray(table[ids], np.float32)
        release(table)
        lengths = np.array([row.real for row in rows])
        return jnp.asarray(embedded), jnp.asarray(np.arange(length) < lengths[:, None])

    def _parameters(self) -> Iterable[Layer]:
        if not self._resident:
            return self._layers.stream()
        self._kept = self._kept or self._layers.read_all()
        return self._kept

    @cached_property
    def _layers(self) -> Layers:
        return Layers(self._donor, functional(T5Block, self.cfg))

    @cached_property
    def _positions(self) -> jax.Array:
        return jnp.asarray(np.asarray(self._donor.source.values["position/table"], np.float32))

    @cached_property
    def _block(self) -> Callable[[Layer, jax.Array, jax.Array, jax.Array], jax.Array]:
        """One block, compiled once for each shape of `x`."""
        cfg, layers, model = self.cfg, self._layers, functional(T5Block, self.cfg)

        def block(layer: Layer, positions: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
            return model.apply(layers.restored(layer), x, attention_bias(cfg, positions, mask))

        return jax.jit(block)

    @cached_property
    def _norm(self) -> Callable[[jax.Array], jax.Array]:
        def norm(cfg: T5Config, rngs: Any) -> RmsNorm:
            return RmsNorm({"embed": cfg.width}, eps=cfg.eps, rngs=rngs)

        scale = np.asarray(self._donor.source.values["norm/scale"], np.float32)
        return jax.jit(partial(functional(norm, self.cfg).apply, {"scale": scale}))


def _groups(rows: Sequence[Row], tokens: int) -> Iterator[tuple[list[int], int]]:
    """Yields the numbers of the rows that are computed together, and their length with padding."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(min(tokens, -(-len(row.ids) // MULTIPLE) * MULTIPLE), []).append(i)
    for length, members in sorted(by_length.items()):
        size = max(1, AT_ONCE // length)
        yield from ((members[i : i + size], length) for i in range(0, len(members), size))

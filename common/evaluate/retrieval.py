"""Image-text retrieval: recall at k in both directions, with any number of right answers per query."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from heirloom.common.evaluate.features import finite

KS = (1, 5, 10)
CELLS = 2**25  # similarities that are in memory at a time
Compare = Callable[[slice], tuple[np.ndarray, np.ndarray]]
"""Rows of queries -> similarity and right answers, [rows, gallery] f32 and bool."""


@dataclass(frozen=True)
class Recall:
    """Share of queries with a right answer among the first k results, by k."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    def mean(self, k: int) -> float:
        """Returns the mean of both directions at k."""
        return (self.image_to_text[k] + self.text_to_image[k]) / 2

    def flat(self) -> dict[str, float]:
        """Returns metrics: `image_to_text_r1`, ..., and `r1`, the mean of both directions."""
        ways = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        by_way = {f"{way}_r{k}": value for way, values in ways.items() for k, value in values.items()}
        return by_way | {f"r{k}": self.mean(k) for k in self.image_to_text}


def retrieval(
    image: np.ndarray, text: np.ndarray, image_group: np.ndarray, text_group: np.ndarray, ks: Sequence[int] = KS
) -> Recall:
    """Computes recall of captions by pictures and of pictures by captions.

    image: [images, joint], text: [captions, joint], unit norm. *_group: [images], [captions], any comparable type: a
    picture and a caption of the same group match. A tie counts against the query, so a model with equal features for
    all inputs scores 0. Raises ValueError for a query without right answer, and InputError for features that are NaN or
    infinite.
    """
    finite(np.asarray(image), "the features of the pictures")
    finite(np.asarray(text), "the features of the captions")
    image, text = np.asarray(image, np.float32), np.asarray(text, np.float32)
    image_group, text_group = np.asarray(image_group), np.asarray(text_group)

    def of_images(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return image[rows] @ text.T, image_group[rows, None] == text_group

    def of_texts(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return (image @ text[rows].T).T, text_group[rows, None] == image_group

    return Recall(_recall(of_images, image, text, ks), _recall(of_texts, text, image, ks))


def _recall(compare: Compare, queries: np.ndarray, gallery: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    step, ranks = max(1, CELLS // max(1, len(gallery))), []
    for first in range(0, len(queries), step):
        similarity, positive = compare(slice(first, first + step))
        if not positive.any(1).all():
            raise ValueError(f"query {first + int(np.argmin(positive.any(1)))} has no right answer in the gallery")
        best = np.where(positive, similarity, -np.inf).max(1, keepdims=True)
        ranks.append(((similarity >= best) & ~positive).sum(1))
    rank = np.concatenate(ranks)
    return {k: float(np.mean(rank < k)) for k in ks}


def distinct(group: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Returns the first position of each distinct (group, caption): a caption that several pictures share is one query.

    group: [captions]; text: [captions, context] tokens. Returns int64 [distinct], ascending.
    """
    _, index = np.unique(np.asarray(group), return_inverse=True)
    _, first = np.unique(np.concatenate([index[:, None], text], axis=1), axis=0, return_index=True)
    return np.sort(first)


def ambiguous(group: np.ndarray, text: np.ndarray) -> int:
    """Returns how many captions another group has, too. group: [captions]; text: [captions, context] tokens."""
    _, caption = np.unique(text, axis=0, return_inverse=True)
    caption = caption.reshape(-1)
    groups = np.bincount(caption[distinct(group, text)])  # of each different caption
    return int((groups[caption] > 1).sum())

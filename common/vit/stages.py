"""Maps from layers to the stages of a gene (SWS §4), and TLEG's linear coefficients."""

from collections.abc import Sequence

import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.surgery.maps import even


def layer_map(depth: int, stages: int) -> list[int]:
    """Stage of each layer: depth // stages copies of each, one more for the first depth % stages; 12 of 5: SWS's.

    No rule is published for fewer layers than stages: then the stages are evenly spaced from the first to the last.
    Raises InputError for a depth below 1.
    """
    if depth < 1 or stages < 1:
        raise InputError(f"depth is {depth} and stages {stages}: choose 1 or more for both")
    if depth < stages:
        return even(stages, depth).rows.tolist()
    each, rest = divmod(depth, stages)
    return [stage for stage in range(stages) for _ in range(each + (stage < rest))]


def unrolled_map(layout: Sequence[int]) -> list[int]:
    """Stage of each layer of the auxiliary net: (2, 1) gives 0, 0, 1."""
    return [stage for stage, times in enumerate(layout) for _ in range(times)]


def linear_coefficients(depth: int) -> np.ndarray:
    """Coefficients of TLEG, [depth, 2] f32: layer l is block 0 plus l / depth (always below 1) times block 1."""
    return np.stack([np.ones(depth), np.arange(depth) / depth], axis=1).astype(np.float32)

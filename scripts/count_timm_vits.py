"""How many of timm's ViTs are read here, and read right.

    python scripts/count_timm_vits.py --json FILE --page docs/coverage.md

Needs the extra `parity`, and timm without its dependencies. With --json it goes on where it was interrupted.

Each model whose name begins with vit_, deit, beit or flexivit is built by timm itself, two layers deep and with heads
of 8 channels, all else as its name says, with random weights in which a wrong setting shows. It is saved as timm saves
it for the hub, and opened by heirloom: *right* where logits agree to 1e-4 of the largest, *wrong* where they do not,
*refused* with the reason.
"""

import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from counting import count, perturb
from make_timm_table import PREFIXES
from torchvision_stand_in import installed

from heirloom.common.checkpoint.family import Donor
from heirloom.common.vit.timm_architectures import arguments, table
from learngene.zoo import FAMILY

with installed():
    import timm
    from timm.models import save_for_hf

DEPTH, CLASSES, HEAD = 2, 5, 8


def save(name: str, folder: Path) -> torch.nn.Module:
    arguments(name, {}, name)  # refuses what the reader refuses by the name alone: then nothing is built
    torch.manual_seed(0)
    small: dict[str, Any] = dict(depth=DEPTH, num_classes=CLASSES)
    small |= {"num_kv_heads": 4} if "sapiens2" in name else {}  # which has a number for each of its layers
    if heads := table()[name].get("num_heads"):  # known where timm builds its VisionTransformer
        small |= dict(embed_dim=HEAD * heads)
    model = timm.create_model(name, **small).eval()
    perturb(model)
    save_for_hf(model, folder, safe_serialization=True)
    return model


def difference(model: Any, donor: Donor, params: Mapping[str, np.ndarray]) -> float:
    """The largest difference between logits, relative to the largest logit."""
    x = (
        np.random.default_rng(0)
        .standard_normal((1, *donor.cfg.picture, donor.cfg.channels))
        .astype(np.float32)
    )
    ours = np.asarray(jax.jit(donor.model.apply)(params, x))
    theirs = model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def reason(said: str) -> str:
    """The part that a refusal names, without the model and the value."""
    if (kind := re.search(r"as its class (\w+)", said)) is not None:
        return f"another class of timm: {kind[1]}"
    if (part := re.search(r"(\w+) is [^(;]*(\([^;]*\))?;", said)) is not None:
        return f"{part[1]} {part[2] or ''}".strip()
    return said


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # Of many names the small models are the same, and are compiled once.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    count(
        __doc__,
        timm,
        [name for name in timm.list_models() if name.startswith(PREFIXES)],
        FAMILY,
        save,
        difference,
        reason,
    )

"""How many of timm's ViTs are read here, and read right.

    python scripts/count_timm_vits.py                  # needs the extra `parity`, and timm without its dependencies

Each model whose name begins with vit_, deit, beit or flexivit is built by timm itself, two layers deep, with random weights in which a
wrong setting shows, saved as timm saves it for the hub, and opened by heirloom: *right* where logits agree to 1e-4 of the largest,
*wrong* where they do not, *refused* with the reason.
"""

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import torch
from make_timm_table import PREFIXES
from torchvision_stand_in import installed

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.errors import InputError
from learngene.zoo import FAMILY

with installed():
    import timm
    from timm.models import save_for_hf

TOLERANCE = 1e-4
DEPTH, CLASSES = 2, 5


def outcome(name: str, folder: Path) -> str:
    """`right`, `wrong` with the error, or `refused` with the reason."""
    torch.manual_seed(0)
    others = {"num_kv_heads": 4} if "sapiens2" in name else {}  # which has a number for each of its layers
    model = timm.create_model(name, depth=DEPTH, num_classes=CLASSES, **others).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_for_hf(model, folder, safe_serialization=True)
    try:
        donor = open_donor(folder, [FAMILY])
    except InputError as error:
        return f"refused: {str(error).replace(f'{folder}/config.json: ', '').replace(str(folder), '')}"
    x = np.random.default_rng(0).standard_normal((1, donor.cfg.size, donor.cfg.size, donor.cfg.channels)).astype(np.float32)
    params = {path: np.asarray(view, np.float32) for path, view in donor.source.values.items()}
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(donor.model.apply)(params, x))
    with torch.no_grad():
        theirs = model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return "right" if error <= TOLERANCE else f"wrong: logits differ by {error:.1e}"


def reason(said: str) -> str:
    """The part that a refusal names, without the model and the value."""
    if (kind := re.search(r"as its class (\w+)", said)) is not None:
        return f"another class of timm: {kind[1]}"
    if (part := re.search(r"(\w+) is [^(;]*(\([^;]*\))?;", said)) is not None:
        return f"{part[1]} {part[2] or ''}".strip()
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", type=Path, help="write the outcome of every name")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [name for name in timm.list_models() if name.startswith(PREFIXES) and args.only in name]
    found: dict[str, str] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = outcome(name, Path(folder))
        if found[name].startswith("wrong"):
            print(f"{name}: {found[name]}")
    kinds = Counter(said.partition(":")[0] for said in found.values())
    for text, count in Counter(reason(said) for said in found.values() if said.startswith("refused")).most_common():
        print(f"{count:4} refused: {text}")
    print(f"timm {timm.__version__}: {kinds['right']} right, {kinds['refused']} refused, {kinds['wrong']} wrong of {len(found)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(kinds["wrong"]))


if __name__ == "__main__":
    main()

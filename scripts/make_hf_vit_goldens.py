"""Write tests/golden/hf_vit: small ViTs of transformers as it saves them, and what it computes with them.

    python scripts/make_hf_vit_goldens.py              # needs the extra `parity`

The models are those of count_hf_vits.py, with weights far from their initial values and an eps that is large enough to
be seen.
"""

from pathlib import Path

import numpy as np
from count_hf_vits import CASES, save

from heirloom.common.checkpoint.convert import open_donor
from learngene.verify import pictures, transformers_outputs
from learngene.zoo import FAMILY

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "hf_vit"
NAMES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model with SwiGLU",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    "siglip": "SiglipVisionModel",
    "clip": "CLIPVisionModelWithProjection",
    "vit_mae": "ViTMAEForPreTraining",
}


def main() -> None:
    expected = {}
    for name, case in NAMES.items():
        assert case in CASES
        save(case, FOLDER / name)
        donor = open_donor(FOLDER / name, [FAMILY])
        expected["pictures"] = pictures(donor.cfg)
        expected[name] = transformers_outputs(donor.file, pictures(donor.cfg), donor.cfg)
    np.savez(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    main()

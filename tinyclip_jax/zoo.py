"""Models by name: the teacher in this package, and the published models on the Hugging Face hub."""

from functools import partial
from pathlib import Path
from typing import Any

from heirloom.common import config
from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor, Family, Outline
from heirloom.common.checkpoint.hub import locate
from heirloom.common.errors import InputError, nearest
from heirloom.common.nn.functional import functional
from heirloom.common.typed import from_json
from tinyclip_jax.cost import parameters, total_macs
from tinyclip_jax.formats import FORMATS, LOOKALIKES
from tinyclip_jax.inputs import sidecars
from tinyclip_jax.model import Clip, ClipConfig, resnet, vit
from tinyclip_jax.reader import text_reader
from tinyclip_jax.verify import features, verify

EMBEDDED = {"emoji": Path(__file__).parent / "emoji_teacher"}

FAMILY = Family(
    "tinyclip",
    Clip,
    partial(from_json, ClipConfig),
    FORMATS,
    sidecars,
    verify,
    parameters,
    total_macs,
    EMBEDDED,
    LOOKALIKES,
    outputs=features,
    reader=text_reader,
)
FAMILIES = (FAMILY,)

RN50 = resnet(64, 12)
VIT_B_32, VIT_B_16 = vit(224, 32, 768, 12, 512, 12), vit(224, 16, 768, 12, 512, 12)
STUDENTS: dict[str, ClipConfig] = {
    "vit_61m_32": vit(224, 32, 640, 12, 512, 9),
    "vit_40m_32": vit(224, 32, 512, 12, 512, 6),
    "vit_39m_16": vit(224, 16, 512, 12, 512, 6),
    "vit_8m_16": vit(224, 16, 256, 10, 256, 3),
    "rn_30m": resnet(56, 9),
    "rn_19m": resnet(44, 6),
}

# Sources of the recipes. The TinyCLIPs on the hub are from the paper's author, under MIT.
LAION_B_32 = "hf:timm/vit_base_patch32_clip_224.laion2b_e16"
OPENAI_RN50 = "hf:timm/resnet50_clip.openai"
OPENAI_B_16 = "hf:openai/clip-vit-base-patch16"
TINYCLIP_61M = "hf:wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M"
TINYCLIP_39M = "hf:wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M"

PUBLISHED = {LAION_B_32: VIT_B_32, OPENAI_B_16: VIT_B_16, OPENAI_RN50: RN50}
PUBLISHED |= {TINYCLIP_61M: STUDENTS["vit_61m_32"], TINYCLIP_39M: STUDENTS["vit_39m_16"]}


def student(name: str) -> ClipConfig:
    """Returns the config of a student: one of STUDENTS, or that of a recipe such as `tinyclip/emoji`."""
    if name in STUDENTS:
        return STUDENTS[name]
    if config.is_recipe(name):
        family, cfg = config.load(name, verb="inherit").describe()  # type: ignore[attr-defined]
        if family is FAMILY:
            return cfg
        raise InputError(f"the student of {name} is no CLIP: name a recipe of tinyclip")
    raise InputError(f"no student {name!r}{nearest(name, STUDENTS)} (there are {', '.join(STUDENTS)}; or a recipe)")


def outline(source: str) -> Donor | Outline:
    """Open a teacher for `heirloom compile`; the shapes of published ones are known, so they are not downloaded."""
    cfg = PUBLISHED.get(source)
    return Outline(FAMILY, cfg, functional(Clip, cfg)) if cfg else open_clip_model(source)


def open_clip_model(source: str, **overrides: Any) -> Donor:
    """Open a CLIP by SOURCE, lazily. Raises InputError when it does not exist or is no CLIP."""
    return open_donor(locate(source, EMBEDDED), [FAMILY], **overrides)

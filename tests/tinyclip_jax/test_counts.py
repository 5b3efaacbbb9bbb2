"""Published sizes: parameters exactly, multiply-accumulates at the published rounding and by a formula of its own."""

import numpy as np
import pytest

from heirloom.common.checkpoint.family import Found
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from tinyclip_jax.cost import macs, parameters, total_macs
from tinyclip_jax.formats import FORMATS
from tinyclip_jax.model import Clip
from tinyclip_jax.resnet import ResNetConfig
from tinyclip_jax.zoo import RN50, STUDENTS, VIT_B_16, VIT_B_32

# image, text without the token table, token table, grand total; G multiply-accumulates of image and text
PUBLISHED = {
    "vit_b_32": (VIT_B_32, (87_849_216, 38_131_200, 25_296_896, 151_277_313), (4.41, 2.98)),
    "vit_b_16": (VIT_B_16, (86_192_640, 38_131_200, 25_296_896, 149_620_737), (17.56, 2.98)),
    "vit_61m_32": (STUDENTS["vit_61m_32"], (61_411_200, 28_674_048, 25_296_896, 115_382_145), (3.08, 2.23)),
    "vit_40m_32": (STUDENTS["vit_40m_32"], (39_691_776, 19_216_896, 25_296_896, 84_205_569), (2.00, 1.49)),
    "vit_39m_16": (STUDENTS["vit_39m_16"], (38_587_392, 19_216_896, 25_296_896, 83_101_185), (7.99, 1.49)),
    "vit_8m_16": (STUDENTS["vit_8m_16"], (8_276_992, 2_520_576, 12_648_448, 23_446_017), (1.79, 0.19)),
    "rn50": (RN50, (38_316_896, 38_393_344, 25_296_896, 102_007_137), (6.11, 2.98)),
    "rn_30m": (STUDENTS["rn_30m"], (29_583_780, 28_936_192, 25_296_896, 83_816_869), (4.69, 2.24)),
    "rn_19m": (STUDENTS["rn_19m"], (18_596_766, 19_479_040, 25_296_896, 63_372_703), (2.92, 1.49)),
}


@pytest.fixture(scope="module")
def specs():
    return {name: functional(Clip, cfg).spec for name, (cfg, _, _) in PUBLISHED.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name, specs):
    _, (image, text, table, total), _ = PUBLISHED[name]
    assert parameters(specs[name]) == {"image": image, "text": text, "token_table": table, "total": total}
    assert image + text + table + 1 == total


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_the_published_ones_and_the_formulas(name, specs):
    cfg, _, (image, text) = PUBLISHED[name]
    counted = macs(cfg, specs[name])
    assert (round(counted["image"] / 1e9, 2), round(counted["text"] / 1e9, 2)) == (image, text)
    assert counted == {"image": image_macs(cfg), "text": text_macs(cfg)}
    assert total_macs(cfg, specs[name]) == image_macs(cfg) + text_macs(cfg)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_each_layout_and_is_known_by_it(name, format, specs, tmp_path):
    """At full size, by names and shapes: arrays of one number that is nowhere stored."""
    cfg, (*_, total), _ = PUBLISHED[name]
    if format.name in ("hf", "flax") and isinstance(cfg.image, ResNetConfig):
        with pytest.raises(InputError, match="image tower is a ResNet"):
            format.write_config(cfg, tmp_path)
        return
    format.write_config(cfg, tmp_path)
    layout = format.layout_of(cfg)
    foreign = layout.foreign(specs[name]).items()
    tensors = {key: np.broadcast_to(np.zeros((), t.dtype), t.shape) for key, t in foreign}
    statistics = sum(leaf.count for path, leaf in specs[name].items() if path.endswith(("/mean", "/variance")))
    assert sum(t.size for t in tensors.values()) == total + statistics
    assert format.read_config(Found(tensors, tmp_path)).cfg == cfg
    views = layout.view(tensors, specs[name])
    assert {path: view.shape for path, view in views.items()} == {
        path: leaf.shape for path, leaf in specs[name].items()
    }


def block_macs(width, hidden, tokens):
    """Four projections, two MLP matrices, scores and values."""
    return tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width


def image_macs(cfg):
    c = cfg.image
    if isinstance(c, ResNetConfig):
        return resnet_macs(c, cfg.joint)
    tokens = (c.size // c.patch) ** 2
    return (
        tokens * 3 * c.patch**2 * c.width
        + c.layers * block_macs(c.width, 4 * c.width, tokens + 1)
        + c.width * cfg.joint
    )


def resnet_macs(c, joint):
    """Stem at half the side, bottlenecks, and an attention of all 50 positions with its projections."""
    w = c.width
    total = (c.size // 2) ** 2 * 9 * (3 * w // 2 + (w // 2) ** 2 + w * w // 2)
    side, read = c.size // 4, w
    for stage, blocks in enumerate(c.blocks):
        planes = w * 2**stage
        for i in range(blocks):
            after = side // 2 if stage and not i else side
            total += side**2 * (read * planes + 9 * planes**2) + after**2 * 4 * planes * (
                planes + (read if not i else 0)
            )
            side, read = after, 4 * planes
    tokens = side**2 + 1
    return total + tokens * read * (3 * read + joint) + 2 * tokens**2 * read


def text_macs(cfg):
    c = cfg.text
    return c.layers * block_macs(c.width, 4 * c.width, 77) + c.width * cfg.joint


def test_trap_the_token_table_is_looked_up_and_not_multiplied(specs):
    """As a matrix it would add 25,296,896 x 77 to the text tower of B/32, two thirds of it."""
    assert macs(VIT_B_32, specs["vit_b_32"])["text"] == 12 * (77 * 12 * 512**2 + 2 * 77**2 * 512) + 512**2 < 3e9

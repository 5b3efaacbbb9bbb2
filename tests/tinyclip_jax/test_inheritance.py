"""Manual inheritance against the released rule, restated in numpy on the tensors it was written for."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Source, build
from tinyclip_jax import layouts
from tinyclip_jax.inherit import manual, pick_layers
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig

TEACHER = ClipConfig(
    ImageConfig(size=16, patch=8, width=32, layers=4, heads=4, hidden=128),
    TextConfig(context=6, vocab=11, width=24, layers=6, heads=3, hidden=96),
    joint=16,
)
STUDENT = replace(
    TEACHER,
    image=replace(TEACHER.image, width=16, layers=2, heads=2, hidden=64),
    text=replace(TEACHER.text, width=16, layers=4, heads=2, hidden=64),
)
HEAD_DIM = 8


@pytest.fixture(scope="module")
def teacher(draw):
    model = functional(Clip, TEACHER)
    return Source(model.spec, draw(model.spec))


@pytest.fixture(scope="module")
def student():
    return functional(Clip, STUDENT)


@pytest.fixture(scope="module")
def inherited(teacher, student):
    return graft(manual(TEACHER, STUDENT), teacher, student.spec, None, partial(student.init, jax.random.key(0)))


def open_clip(params, spec):
    """The tensors of open_clip's layout, packed q, k and v and all."""
    out = {key: np.empty(t.shape, t.dtype) for key, t in layouts.OPEN_CLIP.foreign(spec).items()}
    for path, view in layouts.OPEN_CLIP.view(out, spec).items():
        view.write(np.asarray(params[path]))
    return out


@pytest.mark.parametrize(
    ("teacher", "student", "picked"),
    [
        (12, 12, list(range(12))),
        (12, 10, list(range(10))),
        (12, 9, list(range(9))),  # the first nine, not evenly spread
        (9, 6, list(range(6))),
        (12, 6, [0, 2, 4, 6, 8, 10]),
        (12, 3, [0, 4, 8]),
        (6, 3, [0, 2, 4]),
    ],
)
def test_depth_rule_is_the_released_one(teacher, student, picked):
    assert pick_layers(teacher, student) == picked


def test_the_even_rule_spreads_the_layers():
    assert pick_layers(12, 9, "even") == [0, 1, 3, 4, 6, 7, 8, 10, 11]
    assert pick_layers(12, 1, "even") == [0]


def test_a_student_deeper_than_its_donor_is_refused():
    for rule in ("interval", "even"):
        with pytest.raises(InputError, match="the student has 13 layers, the donor 12: choose 1 to 12"):
            pick_layers(12, 13, rule)
        with pytest.raises(InputError, match="the student has 0 layers"):
            pick_layers(12, 0, rule)


def by_the_released_rule(donor, like):
    """Spec §3.2 on open_clip's own keys: leading slices, q, k and v by leading heads, every step-th layer."""
    depth = {"visual.": (4, 2), "": (6, 4)}
    out = {}
    for key, target in like.items():
        source_key = key
        for prefix, (deep, shallow) in depth.items():
            start = f"{prefix}transformer.resblocks."
            if key.startswith(start):
                layer, rest = key.removeprefix(start).split(".", 1)
                source_key = f"{start}{int(layer) * (deep // shallow)}.{rest}"
        source = donor[source_key]
        if key.endswith(("in_proj_weight", "in_proj_bias")):
            width = target.shape[0] // 3
            packed = source.reshape(3, -1, HEAD_DIM, *source.shape[1:])[:, : width // HEAD_DIM]
            source = (packed[..., : target.shape[-1]] if source.ndim == 2 else packed).reshape(target.shape)
        out[key] = source[tuple(slice(n) for n in target.shape)]
    return out


def test_manual_inheritance_is_the_released_rule(teacher, student, inherited):
    got = open_clip(inherited, student.spec)
    expected = by_the_released_rule(open_clip(teacher.values, teacher.spec), got)
    assert got.keys() == expected.keys() and len(got) == 14 + 6 * 12
    for key in got.keys() - {"logit_scale"}:
        np.testing.assert_array_equal(got[key], expected[key], err_msg=key)


def test_a_setting_that_no_tensor_shows_is_remarked_where_it_differs(remarks):
    manual(TEACHER, STUDENT)
    assert remarks() == []
    manual(TEACHER, replace(STUDENT, text=replace(STUDENT.text, activation="quick_gelu")))
    (said,) = remarks()
    assert said.startswith("the donor's activation is 'gelu', the student's 'quick_gelu'")
    assert said.endswith("set student.text.activation to it")


def test_the_scale_is_not_inherited(teacher, inherited):
    assert teacher.values["logit_scale"] == 2.5
    np.testing.assert_allclose(inherited["logit_scale"], np.log(1 / 0.07), rtol=1e-6)


def test_all_but_the_scale_is_copied(teacher, student):
    resolution = manual(TEACHER, STUDENT).resolve(teacher, student.spec)
    total = sum(leaf.count for leaf in student.spec.values())
    assert sum(line.fraction * line.target.count for line in resolution.lines) == total - 1
    assert resolution.unused == ("logit_scale",)
    assert resolution.fraction == pytest.approx(1 - 1 / total)


def test_a_student_like_its_teacher_computes_the_same_bits(teacher, draw):
    model = functional(Clip, TEACHER)
    copy = graft(manual(TEACHER, TEACHER), teacher, model.spec, None, partial(model.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    images, tokens = rng.normal(size=(3, 16, 16, 3)).astype(np.float32), rng.integers(0, 11, (3, 6))
    features = jax.jit(model.apply)
    theirs, ours = features(teacher.values, images, tokens), features(copy, images, tokens)
    np.testing.assert_array_equal(theirs.image, ours.image)
    np.testing.assert_array_equal(theirs.text, ours.text)


def test_every_rule_is_told_in_words(teacher, student):
    lines = {line.path: line.maps() for line in manual(TEACHER, STUDENT).resolve(teacher, student.spec).lines}
    assert lines["image/blocks/attn/query/kernel"] == "layer: rows 0 2, embed: first 16, head: first 2"
    assert lines["text/blocks/mlp/down/bias"] == "layer: first 4, embed: first 16"
    assert lines["logit_scale"] == "fresh"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (dict(width=40, heads=5), "the student's width 40 exceeds the donor's 32: set it to at most this"),
        (dict(heads=8), "the student's heads 8 exceeds the donor's 4"),
        (dict(hidden=129), "the student's hidden 129 exceeds the donor's 128"),
    ],
)
def test_a_student_larger_than_its_donor_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        manual(TEACHER, replace(TEACHER, image=replace(TEACHER.image, **image)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: replace(c, joint=8),
            "the student's joint is 8, the donor's 16: set student.joint to it",
        ),
        (
            lambda c: replace(c, image=replace(c.image, patch=4)),
            "the student's patch is 4, the donor's 8: set student.image.patch to it",
        ),
        (
            lambda c: replace(c, text=replace(c.text, context=7)),
            "the student's context is 7, the donor's 6: set student.text.context to at most this",
        ),
        (
            lambda c: replace(c, text=replace(c.text, vocab=9)),
            "the student's vocab is 9, the donor's 11: set student.text.vocab to it",
        ),
        (
            lambda c: replace(c, image=replace(c.image, heads=1)),
            "the student's heads have 16 channels, the donor's 8: set student.image.heads to 2",
        ),
        (
            lambda c: replace(c, text=replace(c.text, width=18)),
            "the student's heads have 9 channels, the donor's 8: set student.text.head_dim to 8",
        ),
    ],
)
def test_sizes_no_rule_reconciles_are_named_with_their_setting(change, message):
    with pytest.raises(InputError, match=message):
        manual(TEACHER, change(STUDENT))


def test_a_shorter_context_takes_the_first_positions(teacher, remarks):
    cfg = replace(STUDENT, text=replace(STUDENT.text, context=5))
    plan = manual(TEACHER, cfg)
    assert remarks() == [
        "the student's context is 5, the donor's 6: the first 5 positions are inherited, and longer captions are cut"
        " there"
    ]
    (line,) = (one for one in plan.resolve(teacher, functional(Clip, cfg).spec).lines if one.path == "text/position")
    np.testing.assert_array_equal(build(line), teacher.values["text/position"][:5, :16])


PARTS = replace(
    TEACHER,
    image=replace(TEACHER.image, layer_scale=0.1, eps=1e-6),
    text=replace(TEACHER.text, projection="affine", eot=3),
    logit_bias=True,
)


def test_trained_parts_of_the_donor_that_the_student_lacks_are_said(remarks):
    manual(PARTS, STUDENT)
    said = "\n".join(remarks())
    assert "the donor's eps is 1e-06, the student's 1e-05: the weights were" in said
    assert "the donor's eot is 3, the student's None" in said and "set student.text.projection to it" in said
    assert said.endswith(
        "the student does not have these parameters of the donor, so they are not inherited:"
        " image/blocks/attn_scale/scale, image/blocks/mlp_scale/scale, logit_bias, text/projection/bias"
    )
    manual(PARTS, replace(PARTS, image=replace(PARTS.image, layer_scale=1e-5)))  # weights replace the initial value
    assert remarks() == []


@pytest.mark.parametrize(
    ("donor", "student", "message"),
    [
        (TEACHER, PARTS, r"the student has image/blocks/.* the donor does not: set .*image\.layer_scale to 0\.0"),
        (
            replace(TEACHER, image=replace(TEACHER.image, pre_norm=False)),
            STUDENT,
            r"the student has image/.*, but the donor does not: set student\.image\.pre_norm to False",
        ),
    ],
)
def test_parts_that_the_donor_lacks_are_named_with_their_setting(donor, student, message):
    with pytest.raises(InputError, match=message):
        manual(donor, student)


def test_another_resolution_resamples_the_grid_and_leaves_the_class_token(teacher):
    cfg = replace(TEACHER, image=replace(TEACHER.image, size=32))
    model = functional(Clip, cfg)
    resolution = manual(TEACHER, cfg).resolve(teacher, model.spec)
    params = graft(resolution, teacher, model.spec, None, partial(model.init, jax.random.key(0)))
    assert params["image/position"].shape == (4, 4, 32)
    np.testing.assert_array_equal(params["image/cls_position"], teacher.values["image/cls_position"])
    theirs = teacher.values["image/position"]  # 2 x 2: every point is a mixture of four, and their mean stays
    np.testing.assert_allclose(np.mean(params["image/position"], (0, 1)), theirs.mean((0, 1)), rtol=1e-4, atol=1e-5)
    assert resolution.fraction > 0.999

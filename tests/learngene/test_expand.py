"""Which block goes where: SWS's list, the rule for other depths, and the relatives."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.cli import main
from heirloom.common.data.bad import BadRecord, Delivered
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Source
from heirloom.common.vit.model import Vit, VitConfig
from learngene import ligo, relatives
from learngene.descendant import descendant
from learngene.expand import layer_map, unrolled_map
from learngene.relatives import evenly, mimetic, plan
from learngene.train import Config, resolve
from learngene.zoo import FAMILY, vit

COUNTS = {
    5: (1, 1, 1, 1, 1),
    6: (2, 1, 1, 1, 1),
    7: (2, 2, 1, 1, 1),
    8: (2, 2, 2, 1, 1),
    9: (2, 2, 2, 2, 1),
    10: (2, 2, 2, 2, 2),
    11: (3, 2, 2, 2, 2),
    12: (3, 3, 2, 2, 2),
    13: (3, 3, 3, 2, 2),
    14: (3, 3, 3, 3, 2),
    15: (3, 3, 3, 3, 3),
    16: (4, 3, 3, 3, 3),
}


def test_the_published_map():
    assert layer_map(12, 5) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [layer_map(6, 4).count(s) for s in range(4)] == [2, 2, 1, 1] and layer_map(12, 4) == unrolled_map(
        (3, 3, 3, 3)
    )


@pytest.mark.parametrize("depth", COUNTS)
def test_the_rule_for_other_depths(depth):
    assert layer_map(depth, 5) == unrolled_map(COUNTS[depth])


def test_fewer_layers_than_stages_take_the_ends():
    assert [layer_map(d, 5) for d in (1, 2, 3, 4)] == [[0], [0, 4], [0, 2, 4], [0, 1, 3, 4]]
    with pytest.raises(InputError, match="depth is 0 and stages 5: choose 1 or more"):
        layer_map(0, 5)


@pytest.fixture(scope="module")
def donor(gene, draw):
    """An ordinary ViT of six layers."""
    cfg = gene.of_depth(6)
    spec = functional(Vit, cfg).spec
    return cfg, Source(spec, draw(spec))


@pytest.fixture(scope="module")
def cut(draw):
    """`cut(method, donor, student)`: the student's parameters, and the values an initialiser has for all of them."""

    def cut(method, donor, student, layers=(), head="inherit"):
        cfg, source = donor
        spec = functional(Vit, student).spec
        fresh = draw(spec, seed=9)
        init = lambda paths, place: {path: jax.numpy.asarray(fresh[path]) for path in paths}  # noqa: E731
        made = graft(plan(method, cfg, student, layers, head), source, spec, None, init)
        return {path: np.asarray(value) for path, value in made.items()}, fresh

    return cut


def rows(values, donor, path="blocks/mlp/up/kernel"):
    """For each layer of `path` the donor's layer that it equals; -1 for none."""
    source = donor[1].values[path]
    return [next((i for i, own in enumerate(source) if np.array_equal(own, layer)), -1) for layer in values[path]]


@pytest.mark.parametrize(
    ("method", "depth", "expected"),
    [
        ("stack", 8, [0, 1, 2, 3, 4, 5, 0, 1]),
        ("interlace", 8, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("every", 3, [0, 2, 5]),
        ("every", 8, [0, 0, 1, 1, 2, 3, 4, 5]),
        ("heur", 5, [-1, -1, 3, 4, 5]),
        ("auto", 8, [0, 1, 2, 3, 4, 5, -1, -1]),
        ("select", 4, [0, 1, 2, 3]),
    ],
)
def test_which_layers_the_relatives_take(cut, donor, method, depth, expected):
    made, fresh = cut(method, donor, donor[0].of_depth(depth))
    assert rows(made, donor) == rows(made, donor, "blocks/attn/query/bias") == expected
    kept = method not in ("heur", "auto")
    np.testing.assert_array_equal(
        made["patch/project/kernel"], donor[1].values["patch/project/kernel"] if kept else fresh["patch/project/kernel"]
    )
    if method in ("heur", "auto"):  # fresh rows are the initialiser's, not zeros
        layer = expected.index(-1)
        np.testing.assert_array_equal(made["blocks/mlp/up/kernel"][layer], fresh["blocks/mlp/up/kernel"][layer])


def test_a_gene_expands_by_rule_by_layout_and_by_list(cut, gene, draw):
    spec = functional(Vit, gene).spec
    own = (gene, Source(spec, draw(spec)))
    assert rows(cut("expand", own, gene.of_depth(3))[0], own) == [0, 0, 1]
    assert rows(cut("expand", own, gene.of_depth(5))[0], own) == [0, 0, 1, 1, 1]  # the auxiliary net's own layout
    assert rows(cut("expand", own, gene.of_depth(3), (1, 0, 1))[0], own) == [1, 0, 1]
    assert rows(cut("shuffled", own, gene.of_depth(3))[0], own) == [1, 1, 0]
    for layers, complaint in (
        ((0, 1), "the map has 2 layers, the student 3"),
        ((0, 1, 2), "names stage 2: choose stages 0 to 1"),
    ):
        with pytest.raises(InputError, match=complaint):
            cut("expand", own, gene.of_depth(3), layers)


def test_heads_follow_the_label_set_and_positions_the_resolution(cut, gene, draw):
    spec = functional(Vit, gene).spec
    own = (gene, Source(spec, draw(spec)))
    same, _ = cut("expand", own, gene.of_depth(3))
    np.testing.assert_array_equal(same["head/kernel"], own[1].values["head/kernel"])
    for student, head in ((replace(gene.of_depth(3), classes=7), "inherit"), (gene.of_depth(3), "fresh")):
        made, fresh = cut("expand", own, student, head=head)
        np.testing.assert_array_equal(made["head/kernel"], fresh["head/kernel"])
        np.testing.assert_array_equal(made["norm/scale"], own[1].values["norm/scale"])
    larger, _ = cut("expand", own, replace(gene.of_depth(3), size=16))
    assert larger["position"].shape == (4, 4, 16)


def test_positions_are_resampled_as_torch_does(cut, golden):
    expected = np.load(golden[0].parent / "bicubic.npz")
    spec = functional(
        Vit, VitConfig(size=28, patch=4, width=3, heads=1, hidden=4, layers=1, classes=2, gene="sws", layout=(1,))
    ).spec
    cfg = VitConfig(size=28, patch=4, width=3, heads=1, hidden=4, layers=1, classes=2, gene="sws", layout=(1,))
    values = {path: np.zeros(leaf.shape, np.float32) for path, leaf in spec.items()} | {"position": expected["input"]}
    for size, name in ((48, "up"), (20, "down")):
        made, _ = cut("expand", (cfg, Source(spec, values)), replace(cfg.of_depth(1), size=size))
        np.testing.assert_allclose(made["position"], expected[name], atol=5e-6)


def test_weight_selection_takes_the_published_rows(cut, donor, gene):
    assert evenly(384, 192).rows.tolist() == list(range(0, 384, 2))
    assert evenly(16, 6).rows.tolist() == [0, 3, 6, 9, 12, 15] and evenly(5, 3).rows.tolist() == [0, 2, 4]
    small = replace(gene.of_depth(2), width=8, hidden=12, heads=2)
    made, fresh = cut("select", donor, small)
    theirs = donor[1].values
    np.testing.assert_array_equal(
        made["blocks/mlp/up/kernel"], theirs["blocks/mlp/up/kernel"][:2, ::2][:, :, evenly(32, 12).rows]
    )
    query = theirs["blocks/attn/query/kernel"].reshape(6, 16, 16)[:2, ::2, ::2].reshape(2, 8, 2, 4)
    np.testing.assert_array_equal(made["blocks/attn/query/kernel"], query)
    np.testing.assert_array_equal(made["head/kernel"], fresh["head/kernel"])
    with pytest.raises(InputError, match="set it to at most the donor's"):
        cut("select", donor, replace(small, width=32))


@pytest.mark.parametrize(
    ("method", "change", "complaint"),
    [
        ("expand", dict(), "not a gene: choose another method"),
        ("interlace", dict(layers=13), "has 13 layers, and interlacing 6 gives at most 12"),
        ("stack", dict(width=32), "the student's width is 32, the donor's 16"),
        ("stack", dict(layers=2, gene="sws", layout=(1, 1)), "is a gene"),
    ],
)
def test_what_does_not_go_together_is_refused(donor, method, change, complaint):
    student = replace(donor[0], **{"layers": 4} | change)
    with pytest.raises(InputError, match=complaint):
        plan(method, donor[0], student)


def test_a_gene_is_no_donor_for_the_relatives(gene):
    with pytest.raises(InputError, match="starts from an ordinary ViT, and the donor is a gene"):
        plan("stack", gene, gene.of_depth(4))


def test_mimetic_attention_is_near_the_identity(gene):
    cfg = replace(gene.of_depth(2), width=64, heads=4)
    kernels = mimetic(cfg, jax.random.key(0))
    query, key, value, out = (
        kernels[f"blocks/attn/{name}/kernel"].astype(np.float64) for name in ("query", "key", "value", "out")
    )
    product = np.einsum("ldhk,lhke->lde", value, out)
    diagonal = np.eye(64, dtype=bool)
    assert abs(product[:, diagonal].mean() + 0.4) < 0.03 and abs(product[:, ~diagonal].std() - 0.4 / 8) < 0.005
    scores = np.einsum("ldhk,lehk->lhde", query, key)
    assert (scores[..., diagonal].mean(-1) > 10 * np.abs(scores[..., ~diagonal].mean(-1))).all()


class Repeated:
    """The same batch without end; one example of the fifth replaces a bad record."""

    def __init__(self, batch):
        self.batch, self.next = batch, 0

    def __next__(self):
        bad = (BadRecord("a.png", "a.png does not decode", 12),) if self.next == 4 else ()
        self.next, self.delivered = self.next + 1, Delivered(3, bad)
        return self.batch


def test_ligo_starts_as_a_noisy_stack_and_learns(donor, images, remarks):
    cfg, source = donor
    student = cfg.of_depth(8)
    model = functional(Vit, student)
    before = ligo.first_matrices(cfg, student, seed=0)
    mix = before["layer mlp/up"]
    np.testing.assert_allclose(mix.sum(1), 1, rtol=1e-5)
    assert mix.argmax(1).tolist() == [0, 1, 2, 3, 4, 5, 0, 1] and (mix.max(1) > 0.8).all() and (mix.min(1) > 0).any()
    np.testing.assert_array_equal(before["embed write"], np.eye(16))
    target = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)

    @jax.jit
    def loss(params, batch, key):
        return ((model.apply(params, batch) - target) ** 2).mean()

    def grown(plan):
        return float(loss(graft(plan, source, model.spec, None, model.init), images, None))

    learned = ligo.fit(cfg, source, student, model.spec, loss, Repeated(images), seed=0, steps=20)
    said = "examples that replace bad records in the 20 steps of LiGO: 1; the last: a.png does not decode"
    assert remarks() == [said]
    assert grown(learned) < 0.95 * grown(ligo.plan(cfg, student, before))


def test_ligo_keeps_the_function_when_only_the_mlp_grows(donor, images):
    """Without noise, units repeated where they are written and divided where they are read compute the same."""
    cfg, source = donor
    student = replace(cfg, hidden=64)
    matrices = ligo.first_matrices(cfg, student, seed=0) | {
        f"layer {group}": np.eye(6, dtype=np.float32) for group in ligo.GROUPS
    }
    small, large = functional(Vit, cfg), functional(Vit, student)
    params = graft(ligo.plan(cfg, student, matrices), source, large.spec, None, large.init)
    np.testing.assert_allclose(
        jax.jit(large.apply)(params, images), jax.jit(small.apply)(dict(source.values), images), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match="LiGO needs at least the donor's layers"):
        ligo.plan(student, cfg, matrices)


def test_every_method_has_a_plan():
    from typing import get_args

    assert set(relatives.METHODS) | {"ligo"} == set(get_args(relatives.Method))


def test_an_inherited_head_that_reads_other_features_is_remarked(folder_of, remarks):
    student = VitConfig(size=8, patch=4, width=16, layers=1, heads=2, hidden=32, classes=3)
    donor = open_donor(folder_of(replace(student, layers=2, tokens="cls", pool="cls")), [FAMILY])

    def said(**changes):
        cfg = Config(**dict(student=student, method="stack") | changes)
        resolve(cfg, functional(Vit, cfg.student), donor)
        return remarks()

    remarks()
    (other,) = said()
    assert "read the class token in the donor, and reads the mean of the patches in the student: set" in other
    assert said(student=replace(student, tokens="cls", pool="mean_norm")) == [other]
    for same in (dict(student=replace(student, tokens="cls", pool="cls")), dict(head="fresh"), dict(method="auto")):
        assert said(**same) == []
    donor = open_donor(folder_of(replace(student, layers=2), "mean"), [FAMILY])
    assert said(student=replace(student, pool="mean_norm")) == []  # as SWS's descendants have it


def test_an_ordinary_vit_of_another_depth_is_told_the_command_that_makes_it(folder_of, tmp_path, capsys):
    donor = folder_of(replace(vit("s", 1), classes=5, tokens="cls", pool="cls"))
    assert main(["expand", str(donor), str(tmp_path / "no"), "--depth", "2"]) == 2
    said = capsys.readouterr().err
    words = said.partition(": heirloom ")[2].split()
    named = {"DEST": str(tmp_path / "made"), "SOURCE": str(donor)}
    command = [named.get(word, word) for word in words]
    assert main([*command, "--student.classes", "5"]) == 0
    assert open_donor(tmp_path / "made", [FAMILY]).cfg.layers == 2


def test_a_new_classifier_takes_the_place_of_a_projection(remarks):
    clip = VitConfig(size=8, patch=4, width=16, layers=1, heads=2, hidden=32, classes=0, joint=12)
    made = descendant(clip, 1, classes=3)
    assert (made.classes, made.joint) == (3, 0) and descendant(clip, 1).joint == 12
    assert remarks() == ["the new classifier reads the pooled features; their projection to 12 is left out"]
    donor, student = (functional(Vit, one) for one in (clip, made))
    source = Source(donor.spec, donor.init(jax.random.key(0)))
    lines = {line.path: line.source for line in plan("expand", clip, made).resolve(source, student.spec).lines}
    assert lines["head/kernel"] is None and lines["position"] is not None
    with pytest.raises(InputError, match="set joint to 0 for a classifier"):
        replace(clip, classes=3)

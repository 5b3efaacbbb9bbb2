"""The verbs of learngene in Python."""

import jax
import numpy as np
import pytest
from PIL import Image

import learngene
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.vit.model import Vit, VitConfig
from heirloom.common.vit.stages import layer_map
from learngene.inputs import IMAGENET

GENE = VitConfig(size=8, patch=4, width=8, layers=2, heads=2, hidden=16, classes=3, gene="sws", layout=(2, 1))


@pytest.fixture(scope="module")
def gene(draw, one_device):
    model = functional(Vit, GENE)
    params = {path: jax.numpy.asarray(value) for path, value in draw(model.spec).items()}
    about = dict(pre=IMAGENET.at(8).cropped(1.0), classes=("a", "b", "c"), source="somewhere")
    return learngene.Pretrained(cfg=GENE, model=model, params=params, **about)


def test_a_gene_is_expanded_to_any_depth(gene, tmp_path):
    vit = learngene.expand(gene, 5)
    up = "blocks/mlp/up/kernel"
    np.testing.assert_array_equal(vit.params[up], np.asarray(gene.params[up])[layer_map(5, 2)])
    assert vit.cfg.layers == 5 and vit.cfg.gene == "none" and vit.classes == ("a", "b", "c")
    assert vit.provenance["source"] == "somewhere" and vit.provenance["fraction"] == 1
    other = learngene.expand(gene, 5, layers=(1, 1, 0, 0, 0), classes=4)
    np.testing.assert_array_equal(other.params[up], np.asarray(gene.params[up])[[1, 1, 0, 0, 0]])
    assert other.classes is None and other.provenance["parameters"]["head/kernel"]["fraction"] == 0
    vit.save(tmp_path / "vit")
    again = learngene.load(tmp_path / "vit")
    assert again.cfg == vit.cfg and again.classes == vit.classes and again.pre == vit.pre
    assert repr(gene).splitlines()[3:] == [
        "  blocks: 2 blocks, a gene (sws) that stands for 3 layers, of width 8",
        "  input: 8 px, patch 4",
        "  classes: 3",
    ]


def test_a_descendant_of_the_genes_own_depth_computes_what_the_gene_does(gene):
    pictures = [np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8) for i in range(3)]
    found = learngene.expand(gene, 3).predict(pictures)
    assert found.shape == (3, 3) and isinstance(found, np.ndarray)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(found, gene.predict(pictures), atol=1e-6)


def test_pictures_that_changed_are_scored_again(gene, tmp_path):
    def scored(value):
        for i, name in enumerate("abc"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (value, 80 * i, 40)).save(tmp_path / name / "0.png")
        return learngene.evaluate(gene, tmp_path)["loss"]

    assert scored(0) != scored(200)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(depth=0), "depth is 0: choose 1 or more"),
        (dict(depth=3, classes=0), "classes is 0: choose 1 or more"),
        (dict(depth=3, layers=(0, 1)), "the map has 2 layers, the student 3"),
    ],
)
def test_mistakes_are_one_line(gene, how, words):
    with pytest.raises(InputError, match=words):
        learngene.expand(gene, **how)


def test_an_ordinary_vit_keeps_its_depth(gene):
    with pytest.raises(InputError, match="changes the depth of genes only, and this is an ordinary ViT of 3 layers"):
        learngene.expand(learngene.expand(gene, 3), 4)


def test_a_comparison_is_no_training():
    with pytest.raises(InputError, match=r"compares several trainings: call learngene\.compare\('learngene/emoji'\)"):
        learngene.train("learngene/emoji")
    with pytest.raises(InputError, match=r"no field gene\.log_evry; did you mean 'log_every'"):
        learngene.compare("learngene/emoji", gene={"log_evry": 3})


@pytest.mark.slow
def test_a_comparison_of_tiny_models(one_device, tmp_path):
    tiny = dict(steps=2, log_every=1, eval_every=2, save_every=2, pipeline={"batch": 1000})
    tiny |= {"optim": {"warmup": 1}, "data": {"path": "emoji:noto"}, "held_out": {"path": "emoji:noto"}}
    compared = learngene.compare(
        "learngene/emoji",
        tmp_path,
        depths=(2,),
        teacher=tiny | {"student": {"widths": (8, 8, 8), "size": 16}},
        gene=tiny | {"student": {"size": 16, "width": 8, "heads": 2, "hidden": 8}},
        tune={"warmup": 0},
        scratch={"warmup": 0},
    )
    steps, top1 = compared.curve("sws", 2)
    assert steps[0] == 0 and len(steps) == len(top1) == 2 and set(compared.results["arms"]) == {"sws-2", "scratch-2"}
    assert compared.gene.cfg.gene == "sws" and compared.model("scratch", 2).cfg.layers == 2
    assert compared.plot().size == (1200, 480) and len(repr(compared).splitlines()) == 4
    with pytest.raises(InputError, match="no model 'sws-3'; did you mean 'sws-2'"):
        compared.curve("sws", 3)

"""`heirloom compile` on toy recipes: what it says of memory, communication and work."""

import pytest

from common import config
from common.cli import main
from common.compile import Topology, compile_for
from common.errors import InputError


def test_a_step_of_lit_on_a_pod_uses_the_kernels_and_says_what_it_takes(tmp_path):
    flags = ["--student.implementation", "mosaic_tpu", "--step.compute", "bfloat16", "--student.width", "64", "--student.heads", "2"]
    result = compile_for(config.load("lit/smoke", flags), Topology.parse("v5e:2x2"))
    assert result["fits"] and result["devices"] == 4
    assert 0 < result["bytes_per_device"] < result["hbm"] == 16 * 2**30
    assert result["collectives"]["all-reduce"]["bytes"] > 0, "gradients of rows on four chips are summed"
    assert result["step_seconds"] == max(result["parts"].values()) > 0


def test_a_step_of_a_gene_with_its_published_teacher_is_outlined_not_fetched():
    flags = ["--student.layers", "1", "--student.layout", "2", "--student.size", "224", "--pipeline.batch", "4"]
    recipe = config.load("learngene/aux_ti", flags)
    result = compile_for(recipe, Topology.parse("v5e:2x2"))
    teacher = 17.5e9  # DeiT-B's multiply-accumulates
    assert result["fits"] and result["flops"] > 4 * recipe.augment.views * 2 * teacher


def test_what_does_not_fit_is_told_with_advice():
    flags = ["--pipeline.batch", "262144", "--student.width", "256", "--student.heads", "4", "--student.hidden", "1024"]
    result = compile_for(config.load("lit/smoke", flags), Topology.parse("v5e:2x2"))
    assert not result["fits"] and result["bytes_per_device"] > result["hbm"] > 15 * 2**30
    assert "--student.remat full" in result["advice"]


@pytest.mark.parametrize("topology", ["v5e", "v5litepod:4x4", "v5e:3x5"])
def test_no_such_slice(topology, capsys):
    assert main(["compile", "lit/smoke", "--topology", topology]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_topologies_are_parsed():
    assert str(Topology.parse("v5p:4x4x8")) == "v5p:4x4x8"
    with pytest.raises(InputError, match="did you mean 'v6e'"):
        Topology.parse("v6:4x4")

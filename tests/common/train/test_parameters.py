"""A teacher or donor with NaN is refused when it is opened, before a run has taken a step or a student is written."""

import numpy as np
import pytest

from heirloom.common import config
from heirloom.common.checkpoint.weights import write_config, write_params
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.train.parameters import finite
from learngene.zoo import open_classifier
from lit_jax.zoo import open_dit
from tinyclip_jax.zoo import open_clip_model

OPEN = {"tinyclip": open_clip_model, "learngene": open_classifier, "lit": open_dit}


@pytest.fixture
def written(tmp_path):
    """A weights folder of a smoke recipe's student, with one value in one leaf replaced."""

    def written(method, leaf=None, value=np.nan, dtype=np.float32):
        family, cfg = config.load(f"{method}/smoke").describe()
        params = {path: np.zeros(x.shape, np.float32) for path, x in functional(family.module, cfg).spec.items()}
        if leaf:
            params[leaf].reshape(-1)[-1] = value
        folder = tmp_path / str(leaf).replace("/", "_")
        folder.mkdir()
        write_params(folder, params, dtype)
        write_config(folder, family.name, cfg)
        return folder

    return written


@pytest.mark.parametrize(
    ("method", "leaf", "value"),
    [
        ("tinyclip", "text/token/table", np.nan),
        ("learngene", "blocks/mlp/up/kernel", np.inf),
        ("lit", "blocks/attn/out/kernel", -np.inf),
    ],
)
def test_the_leaf_that_is_not_finite_is_named(method, leaf, value, written):
    opened = OPEN[method]
    assert finite(opened(str(written(method))), "donor")
    folder = written(method, leaf, value)
    for role in ("donor", "teacher"):
        with pytest.raises(InputError, match=rf"the {role}'s {leaf} holds NaN or infinity") as refused:
            finite(opened(str(folder)), role)
        assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "leaf"),
    [("tinyclip", "image/patch/project/kernel"), ("learngene", "blocks/mlp/up/kernel"), ("lit", "final/kernel")],
)
def test_no_student_is_cut_from_a_broken_donor(method, leaf, written, tmp_path):
    donor, made = written(method, leaf), tmp_path / "made"
    with pytest.raises(InputError, match=f"{donor}: the donor's {leaf} holds NaN or infinity"):
        config.load(f"{method}/smoke", ["--donor", str(donor)]).inherit(made)
    assert not made.exists()


def test_no_descendant_is_made_of_a_broken_gene(written, tmp_path, capsys):
    from heirloom.common.cli import main

    gene, made = written("learngene", "blocks/attn/out/kernel", np.inf), tmp_path / "made"
    assert main(["expand", str(gene), str(made), "--depth", "2"]) == 2
    said = capsys.readouterr().err
    assert f"{gene}: the donor's blocks/attn/out/kernel holds NaN or infinity" in said and said.count("\n") == 1
    assert not made.exists()


def test_a_run_with_a_broken_teacher_does_not_start(written, tmp_path, capsys):
    from heirloom.common.cli import main

    teacher = written("learngene", "head/bias")
    command = ["--teacher", str(teacher), "--distill.alpha", "0.5"]
    assert main(["train", "learngene/smoke", "--run", str(tmp_path / "run"), *command]) == 2
    said = capsys.readouterr().err
    assert f"{teacher}: the teacher's head/bias holds NaN or infinity" in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

import json

import pytest

from heirloom.common.errors import InputError
from heirloom.common.processes import exchange
from heirloom.common.train import agreement
from heirloom.common.train.agreement import agree, one_place, versions


@pytest.fixture
def others(monkeypatch):
    """Sets what the other processes say."""

    def say(*facts):
        monkeypatch.setattr(agreement, "exchange", lambda data: [data, *(json.dumps(fact).encode() for fact in facts)])

    return say


def config(lr=0.1, workers=0, steps=5):
    return {"config": {"optim": {"lr": lr}, "pipeline": {"workers": workers}, "steps": steps}}


def test_equal_facts_pass(others):
    others(config(), config())
    agree(config())


def test_a_difference_is_named_with_its_process(others):
    others(config(), config(lr=0.3, steps=7))
    with pytest.raises(InputError) as raised:
        agree(config())
    said = "config.optim.lr: 0.1 in process 0, 0.3 in process 2 (and 1 more); start all alike"
    assert str(raised.value) == f"the processes of this job differ: {said}"


def test_each_host_may_have_its_own_workers(others):
    others(config(workers=3))
    agree(config())


def test_a_field_that_one_process_lacks(others):
    others({"versions": {}})
    with pytest.raises(InputError, match=r'versions\.jax: "1" in process 0, absent in process 1'):
        agree({"versions": {"jax": "1"}})


def test_one_process_alone_agrees(tmp_path):
    assert exchange(b"abc") == [b"abc"]
    agree(config())
    one_place(tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing to compare


def test_versions_of_what_a_result_depends_on():
    assert {"jax", "heirloom-jax"} <= versions().keys()
    assert all(number[0].isdigit() for number in versions().values())

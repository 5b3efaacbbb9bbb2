"""The parts of the races that decide what their pages say."""

import operator

import pytest
from pyarrow import compute, parquet

from benchmarks import bench, gene_budget
from benchmarks import tinyclip_race as race


def test_steps_to_a_score_are_read_off_between_two_budgets():
    curve = [(400, 0.06), (100, 0.02), (200, 0.01), (800, 0.05)]
    assert bench.steps_to(0.02, curve) == 100
    assert bench.steps_to(0.035, curve) == pytest.approx(200 * 2**0.5)  # halfway from 0.01 to 0.06, on a log axis
    assert bench.steps_to(0.061, curve) is None
    errors = [(100, 0.5), (200, 0.4), (400, 0.2)]
    assert bench.steps_to(0.3, errors, operator.le) == pytest.approx(200 * 2**0.5)
    assert bench.steps_to(0.1, errors, operator.le) is None


def test_the_table_has_a_ratio_for_each_seed_and_says_where_scratch_never_arrives():
    budgets = {race.SCRATCH: (100, 200), race.AFFINITY: (50, 100), race.CONTRASTIVE: (50, 100)}
    scores = {race.SCRATCH: (0.01, 0.02), race.AFFINITY: (0.02, 0.04), race.CONTRASTIVE: (0.01, 0.015)}
    rows = [
        {"arm": arm, "seed": seed, "steps": steps, "r1": r1}
        for arm in budgets
        for seed in (0, 1)
        for steps, r1 in zip(budgets[arm], scores[arm], strict=True)
    ]
    lines = race.report(rows, budgets)
    assert lines[2] == "| scratch, contrastive |  | 1.0 ± 0.0 | 2.0 ± 0.0 |"
    assert "| 2 % | 200, 200 | 50, 50 | never, never | 4.0, 4.0 |" in lines
    assert "| 4 % | never, never | 100, 100 | never, never | > 2.0, > 2.0 |" in lines
    assert "| 6 % | never, never | never, never | never, never | -, - |" in lines


def test_validation_concepts_are_some_of_those_that_the_teacher_does_not_know(tmp_path):
    sources = race.split(tmp_path)
    table = parquet.read_table(tmp_path / "emoji.parquet")
    held, tested, train = (
        set(table.filter(compute.equal(table["split"], part))["concept"].to_pylist())
        for part in ("validation", "test", "train")
    )
    before = parquet.read_table(race.emoji.path("noto"), filters=[("split", "=", "test")])
    assert held | tested == set(before["concept"].to_pylist()) and not (held | tested) & train
    assert len(held) == race.VALIDATION and len(tested) == 200 and not held & tested
    assert {part: source.split for part, source in sources.items()} == {"validation": "validation", "test": "test"}


def test_each_arm_has_its_own_loss_start_and_schedule():
    arms = {arm: race.recipe(arm, 50, 1e-3, 3, 16) for arm in race.COLOURS}
    assert {arm: (bool(cfg.donor), bool(cfg.teacher), cfg.loss.alpha) for arm, cfg in arms.items()} == {
        race.SCRATCH: (False, False, 0.0),
        race.AFFINITY: (True, True, 1.0),
        race.CONTRASTIVE: (True, False, 0.0),
    }
    assert all(cfg.steps == 50 and cfg.optim.warmup == 5 and cfg.pipeline.seed == 3 for cfg in arms.values())


def test_the_mean_of_a_seed_is_that_of_its_models():
    row = {"models": 2, "seed": 0, "flops": 1.0}
    rows = [
        row | {"depth": 4, "method": "sws", "top1": 0.5},
        row | {"depth": 6, "method": "sws", "top1": 0.6},
        row | {"depth": 4, "method": "scratch", "top1": 0.4},
        row | {"depth": 4, "method": "sws", "top1": 0.9, "seed": 1},
        row | {"depth": 4, "method": "sws", "top1": 0.9, "models": 1},
    ]
    assert gene_budget.means(rows, 2, 0) == {"sws": 55.0, "scratch": 40.0}

"""The parts of the races that decide what their pages say."""

import operator

import pytest
from pyarrow import compute, parquet

from benchmarks import bench, gene_budget, lit_race
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
    lines = race.report(rows, budgets, "r1")
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


def test_a_donor_is_matched_where_the_curve_of_a_seed_comes_within_two_percent(tmp_path):
    def row(steps, mse, **more):
        return {"steps": steps, "rate": 0.01, "mse": mse, "kid_thumbnails": 0.01, **more}

    result = {
        "donor": [row(500, 0.051), row(1000, 0.05)],
        "teacher": row(500, 0.04),
        "rows": [
            *(row(n, mse, arm=lit_race.MAIN, seed=0) for n, mse in ((100, 0.07), (200, 0.051), (400, 0.048))),
            *(row(n, mse, arm=lit_race.MAIN, seed=1) for n, mse in ((100, 0.07), (200, 0.06))),
            row(100, 0.061, arm="1 heads, shared filters", seed=0),
        ],
    }
    lines = lit_race.report(result)
    assert "| LiT, inherits, distilled | 200 | 0.01 | 0.0555 ± 0.0064 | 0.0100 ± 0.0000 |" in lines
    assert lines[-3:] == [
        "the donor's last doubling took 2.0% off (plateau: 2%)",
        "LiT, inherits, distilled, rate 0.01, seed 0: within 2% of the donor's error after 20% of its steps",
        "LiT, inherits, distilled, rate 0.01, seed 1: within 2% of the donor's error never",
    ]
    lit_race.plot(result, tmp_path / "race.png")
    assert (tmp_path / "race.png").stat().st_size > 5000


def test_every_number_of_heads_divides_the_width_of_the_race():
    size = lit_race.SIZES["cpu"]
    arms = lit_race.Arms(size, {"data": lit_race.SourceConfig("x"), "held_out": lit_race.SourceConfig("y")}, "donor")
    students = [cfg.student for cfg in arms.heads(10, 1e-3, 0).values()]
    assert len({(s.heads, s.filters) for s in students}) == 12
    assert all(s.attention == "linear" and s.width % s.heads == 0 for s in students)

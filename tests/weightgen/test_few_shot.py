"""The demo's comparison in a world where the right answer is known."""

import numpy as np
import pytest

from heirloom.common.train.optim import OptimConfig
from weightgen.few_shot import FewShotConfig, compare
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.generator.sample import SampleConfig
from weightgen.train import LoopConfig
from weightgen.zoo.data import SHARES, Bank, EmojiTasks, Projection
from weightgen.zoo.fit import FitConfig

SMALL = DenoiserConfig(width=16, layers=1, heads=2, hidden=16)


def world(classes, seed, features=8):
    """Gaussian classes, a bank for each part."""
    rng = np.random.default_rng(seed)
    centre = 1.2 * rng.standard_normal((classes, features))
    names = [str(i) for i in range(classes)]
    labels = np.repeat(np.arange(classes), 12)
    return {
        p: Bank.of((centre[labels] + rng.standard_normal((len(labels), features))).astype(np.float32), labels, names)
        for p in SHARES
    }


@pytest.fixture(scope="module")
def result(tmp_path_factory, one_device):
    cfg = FewShotConfig(
        members=150,
        fit=FitConfig(steps=30, lr=0.1, weight_decay=0.03),
        few=FitConfig(steps=30, lr=0.1, weight_decay=0.3),
        latent=9,
        denoiser=SMALL,
        loop=LoopConfig(
            steps=30, batch=32, optim=OptimConfig(lr=2e-3, warmup=3, clip=1.0), log_every=10, save_every=10**6
        ),
        tasks=40,
        samples=4,
        sample=SampleConfig(steps=8),
    )
    tasks = EmojiTasks(world(20, 0), world(12, 1), Projection("pixels", np.zeros(8), np.eye(8)))
    return compare(cfg, tasks, tmp_path_factory.mktemp("few_shot") / "run", 0, lambda line: None)


def test_the_comparison_in_a_world_of_gaussians(result):
    five, one = (result.rows[f"unseen, {shots}"] for shots in (5, 1))
    blind = {"random head", "zoo mean", "KDE of the best 30 % in latents", "zoo head + 0.12 noise"}
    assert {name: five[name].mean for name in blind} == pytest.approx(dict.fromkeys(blind, 0.2), abs=0.06)
    assert five["ridge"].mean > 0.7 and five["hypernetwork"].mean > 0.5, "maps see the condition"
    assert five["prototype"].mean > 0.75 > five["nearest zoo row per class"].mean > 0.3
    assert five["prototype"].mean > one["prototype"].mean + 0.05
    assert five["trained on all pictures of the classes"].mean > 0.75
    # The prior alone is worth something before the denoiser is, and the condition decides.
    assert five["generated, weights averaged"].mean > five["generated from another task's pictures"].mean + 0.3
    assert five["generated from another task's pictures"].mean == pytest.approx(0.2, abs=0.08)
    assert five["generated, best by test (oracle)"].mean >= five["generated, best by selection set"].mean
    assert five["generated, weights averaged"].mean >= five["generated, single sample"].mean - 0.01


def test_criteria_say_what_was_measured(result):
    assert len(result.criteria) == 7 and all(
        {"measured", "bar", "met"} == found.keys() for found in result.criteria.values()
    )
    gap = result.criteria["5 pictures: averaged - nearest row"]
    rows = result.rows["unseen, 5"]
    measured = rows["generated, weights averaged"].mean - rows["nearest zoo row per class"].mean
    assert gap["measured"].startswith(f"{100 * measured:.1f}") and gap["met"] == (
        measured - float(gap["measured"].split()[-1]) / 100 > 0.05
    )
    assert result.extra["novelty, 5"]["noise"] < result.extra["novelty, 5"]["zoo"]
    assert result.extra["codec"]["error"] < 1e-6  # nine latents of nine weights
    assert 0 < result.extra["error IoU, 5"] < 1

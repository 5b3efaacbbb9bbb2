"""The language model that weights are explored and adapted on."""

import jax
import numpy as np
import pytest

from benchmarks.weightgen.gpt import (
    Gpt,
    GptConfig,
    adapted,
    fresh_adapter,
    last_logits,
    next_token_loss,
    scorer,
    train,
    train_adapters,
    windows_of,
    word_choice,
)
from heirloom.common.nn.functional import functional

CFG = GptConfig(vocab=8, context=8, width=16, layers=2, heads=2)
MODEL = functional(Gpt, CFG)
CYCLE = np.tile(np.arange(8, dtype=np.int32), 40)  # every word has one successor


@pytest.fixture(scope="module")
def base():
    return {path: np.asarray(x) for path, x in train(MODEL, CFG, CYCLE, 60, batch=8, lr=1e-2).items()}


def test_a_position_sees_nothing_that_comes_after_it(base):
    tokens = np.stack([CYCLE[:8], CYCLE[:8]])
    tokens[1, 5:] = 0
    first, second = np.asarray(MODEL.apply(base, tokens))
    np.testing.assert_allclose(first[:5], second[:5], atol=1e-5)
    assert np.abs(first[5:] - second[5:]).max() > 0.1


def test_the_next_word_is_learned_and_chosen(base):
    choices = word_choice(CYCLE, CFG, 50, options=4)
    rows = np.arange(50)
    right = (choices.tokens[:, 0, -2] + 1) % 8
    np.testing.assert_array_equal(choices.tokens[rows, choices.answer, -1], right)
    assert (choices.tokens[:, :, -1] == right[:, None]).sum() == 50, "no wrong option is the right word"
    assert len(set(choices.answer)) == 4
    score = scorer(last_logits(MODEL), choices)
    assert score(base) == 1
    assert score(MODEL.init(jax.random.key(1))) < 0.6


def test_an_adapter_changes_nothing_at_first_and_learns_another_text(base):
    begin, rng = fresh_adapter(CFG, 2, jax.random.key(0)), np.random.default_rng(0)
    for path, x in adapted(base, begin).items():
        np.testing.assert_array_equal(x, base[path])
    backwards = CYCLE[::-1].copy()
    windows = np.stack([windows_of(text, 9, (80, 4), rng) for text in (CYCLE, backwards)])
    found = train_adapters(MODEL, CFG, base, windows, begin, lr=2e-2)

    def loss(task, text):
        adapter = {path: x[task] for path, x in found.items()}
        return float(next_token_loss(MODEL, adapted(base, adapter), text[None, :9]))

    before = float(next_token_loss(MODEL, base, backwards[None, :9]))
    assert loss(1, backwards) < before - 1, "each task has its own adapter"
    assert loss(0, CYCLE) < 0.2 < 1 < loss(1, CYCLE)

"""Recall against hand-made rankings, and the ways a score could flatter."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from common.errors import InputError
from common.evaluate.features import embedder
from common.evaluate.retrieval import distinct, retrieval
from common.evaluate.zeroshot import accuracy, classifier


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_recall_by_hand():
    # Similarity rows are pictures: picture 0 ranks its caption first, 1 second, 2 third.
    text = np.eye(3, dtype=np.float32)
    image = np.array([[0.9, 0.1, 0.0], [0.8, 0.5, 0.1], [0.7, 0.6, 0.5]], np.float32)
    found = retrieval(image, text, np.arange(3), np.arange(3), ks=(1, 2, 3))
    assert found.image_to_text == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 3: 1.0}
    # Columns: caption 0 ranks picture 0 first, caption 1 its picture second, caption 2 its picture first.
    assert found.text_to_image == {1: pytest.approx(2 / 3), 2: 1.0, 3: 1.0}
    assert found.mean(1) == pytest.approx(0.5)
    assert found.flat()["r1"] == pytest.approx(0.5)


def test_any_picture_of_the_group_is_a_hit():
    text = np.eye(2, dtype=np.float32)
    image = np.array([[0.9, 0.1], [0.1, 0.2], [0.3, 0.8]], np.float32)
    found = retrieval(image, text, np.array(["a", "a", "b"]), np.array(["a", "b"]), ks=(1,))
    assert found.text_to_image == {1: 1.0}
    assert found.image_to_text == {1: pytest.approx(2 / 3)}  # picture 1 of "a" looks like "b"


def test_a_collapsed_model_scores_nothing():
    same = np.ones((10, 4), np.float32) / 2
    found = retrieval(same, same, np.arange(10), np.arange(10))
    assert found.image_to_text == {1: 0.0, 5: 0.0, 10: 1.0}


def test_a_query_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="query 1 has no right answer"):
        retrieval(np.eye(2), np.eye(2), np.array([0, 5]), np.array([0, 1]))


def test_distinct_captions_are_asked_for_once():
    tokens = np.array([[1, 2], [1, 2], [1, 2], [3, 2]])
    assert distinct(np.array(["a", "a", "b", "a"]), tokens).tolist() == [0, 2, 3]


@given(st.integers(1, 23), st.integers(2, 9))
def test_no_example_counts_more_for_standing_in_a_short_batch(count, size):
    mesh = jax.make_mesh((2, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:2])
    rows = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    embed = embedder(lambda params, x: 2 * x + params["bias"], mesh, size)
    got = np.concatenate([embed({"bias": np.float32(1)}, rows[i : i + size]) for i in range(0, count, size)])
    np.testing.assert_array_equal(got, 2 * rows + 1)


def test_classifier_is_the_mean_on_the_sphere():
    vectors = {"a cat": [1.0, 0.0], "one cat": [0.0, 1.0], "a dog": [0.6, -0.8], "one dog": [0.6, -0.8]}
    got = classifier(("cat", "dog"), ("a {}", "one {}"), lambda texts: np.array([vectors[t] for t in texts], np.float32))
    np.testing.assert_allclose(got, [[0.5**0.5, 0.5**0.5], [0.6, -0.8]], rtol=1e-6)


def test_accuracy_by_hand_and_ties_count_against():
    classes = unit(np.eye(7, dtype=np.float32))
    image = np.zeros((3, 7), np.float32)
    image[0, 2] = 1  # right
    image[1, :5] = [0.5, 0.4, 0.3, 0.2, 0.1]  # class 4 is fifth
    image[2] = 1  # everything the same: the right class is last
    got = accuracy(image, classes, np.array([2, 4, 0]))
    assert (got.top1, got.top5) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    for labels in (np.array([2, -1, 0]), np.array([2.0, 4, 0])):
        with pytest.raises(InputError, match="labels are whole numbers from 0 up"):
            accuracy(image, classes, labels)

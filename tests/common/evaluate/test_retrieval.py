"""Recall against hand-made rankings, and the ways a score could flatter."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from heirloom.common.data.lines import read_lines
from heirloom.common.errors import InputError
from heirloom.common.evaluate import retrieval as evaluated
from heirloom.common.evaluate.features import embedder
from heirloom.common.evaluate.probe import probe
from heirloom.common.evaluate.retrieval import ambiguous, distinct, retrieval
from heirloom.common.evaluate.zeroshot import accuracy, classifier, read_templates


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


def test_large_sets_are_ranked_in_parts_with_the_same_result(monkeypatch):
    rng = np.random.default_rng(0)
    groups = np.arange(23), rng.permutation(np.arange(41) % 23)
    image = rng.integers(-3, 4, (23, 4))  # exact, and many similarities tie
    text = image[groups[1]] + rng.integers(-1, 2, (41, 4))
    whole = retrieval(image, text, *groups)
    assert 0 < whole.image_to_text[1] < whole.image_to_text[10] < 1
    for cells in (1, 100, 300):
        monkeypatch.setattr(evaluated, "CELLS", cells)
        assert retrieval(image, text, *groups) == whole
        with pytest.raises(ValueError, match="query 20 has no right answer"):
            retrieval(image, text, groups[0], np.where(groups[1] == 20, 0, groups[1]))


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


def test_captions_that_stand_in_several_groups_are_counted():
    text = np.array([[1, 2], [1, 2], [3, 4], [1, 2], [5, 6]])
    assert ambiguous(np.array([0, 0, 0, 1, 1]), text) == 3
    assert ambiguous(np.array([0, 0, 0, 0, 1]), text) == 0


@given(st.integers(1, 23), st.integers(2, 9))
def test_no_example_counts_more_for_standing_in_a_short_batch(count, size):
    mesh = jax.make_mesh(
        (2, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:2]
    )
    rows = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    embed = embedder(lambda params, x: 2 * x + params["bias"], mesh, size)
    got = np.concatenate([embed({"bias": np.float32(1)}, rows[i : i + size]) for i in range(0, count, size)])
    np.testing.assert_array_equal(got, 2 * rows + 1)


def test_classifier_is_the_mean_on_the_sphere():
    vectors = {"a cat": [1.0, 0.0], "one cat": [0.0, 1.0], "a dog": [0.6, -0.8], "one dog": [0.6, -0.8]}
    got = classifier(
        ("cat", "dog"), ("a {}", "one {}"), lambda texts: np.array([vectors[t] for t in texts], np.float32)
    )
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
        with pytest.raises(InputError, match="labels must be whole numbers from 0"):
            accuracy(image, classes, labels)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_that_computes_no_numbers_scores_nothing(value):
    """No comparison with NaN is true, so that no wrong answer would rank before the right one: 100 % everywhere."""
    good, labels = np.eye(4, dtype=np.float32), np.arange(4)
    bad = good.copy()
    bad[2, 1] = value
    said = r": NaN or infinite for 1 of 4 \(first: 2\); cannot compute a score"
    for image, text in ((bad, good), (good, bad)):
        with pytest.raises(InputError, match=said):
            retrieval(image, text, labels, labels)
        with pytest.raises(InputError, match=said):
            accuracy(image, text, labels)
        with pytest.raises(InputError, match=said):
            probe(image, labels, text, labels)
    with pytest.raises(InputError, match="the features of the class names" + said):
        classifier("abcd", ("{}",), lambda texts: bad["abcd".index(texts[0]), None])


def test_a_probe_needs_labels_that_are_classes():
    x = np.eye(3, dtype=np.float32)
    for labels in (np.array([0, -1, 1]), np.array([0.0, 1.0, 2.0])):
        with pytest.raises(InputError, match="labels must be whole numbers from 0"):
            probe(x, labels, x, np.arange(3))
    with pytest.raises(InputError, match="a test example has the label 2, the training examples have 0 to 1"):
        probe(x, np.array([0, 1, 1]), x, np.arange(3))


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("\ufeffa photo of a {}.\n  art of the {c} \n\n", encoding="utf-8")
    assert read_templates(file) == ("a photo of a {}.", "art of the {}")
    vectors = classifier(("a {c} in {braces}",), ("see {}",), lambda texts: np.full((1, 1), len(texts[0]), np.float32))
    assert vectors.tolist() == [[1.0]]  # a name is text, whatever braces it has


@pytest.mark.parametrize(
    "line", ["a cat", "a {} of {}", "a {c} of {c}", "a {} of {c}", "a %s", "a {0}", "a {name}", "a {}}", "{{}}"]
)
def test_other_templates_are_refused(tmp_path, line):
    file = tmp_path / "templates.txt"
    file.write_text(f"a photo of a {{}}\n{line}\n")
    with pytest.raises(InputError, match=r"templates\.txt, line 2: .* needs one \{\} for the name of the class"):
        read_templates(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("une école {}".encode("latin-1"), r"t\.txt is not readable as UTF-8 text"),
        (b"\n \n", r"t\.txt is empty"),
        (b"a {}\n\nb {}\n", r"t\.txt, line 2 is blank"),
    ],
)
def test_text_files_that_are_not_lines(tmp_path, data, message):
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_lines(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{0: 'tench',\n1: 'goldfish'}", "it is code"),
        ("lambda c: f'a {c}.',\nlambda c: f'the {c}.',", "it is code"),
        ("'tench',\n'goldfish'", "its entries are quoted"),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish", "its entries have identifiers"),
        ("0 tench\n1 goldfish", "its entries are numbered"),
        ("id,name\n0,tench", "it begins with a header"),
        ("class_name\ntench\ngoldfish", "it begins with a header"),
    ],
)
def test_lists_with_more_than_their_entries_are_refused(tmp_path, text, what):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(InputError, match=rf"t\.txt: {what} .*; write one entry a line and nothing else"):
        read_lines(tmp_path / "t.txt")


@pytest.mark.parametrize("text", ["0\n1\n2", "2 of clubs\n3 of clubs", "name tag\ncat", "n01440764", "{} 1: one"])
def test_entries_that_only_look_like_it(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    assert read_lines(tmp_path / "t.txt") == tuple(text.split("\n"))


def test_braces_are_a_template(tmp_path):
    (tmp_path / "t.txt").write_text("{}\n")
    assert read_lines(tmp_path / "t.txt") == ("{}",)
    (tmp_path / "t.txt").write_text("{c} in art\n{} of art\n")
    assert read_lines(tmp_path / "t.txt") == ("{c} in art", "{} of art")


def test_a_json_list_is_a_list(tmp_path):
    (tmp_path / "t.json").write_text('[\n  "art of the {c}",\n  "a photo of a {}"\n]\n')
    assert read_templates(tmp_path / "t.json") == ("art of the {}", "a photo of a {}")
    for other in ('{"0": "cat"}', '["cat", 3]', '["cat", " "]', "[]", "['cat', 'dog']", "[\ncat\n]"):
        (tmp_path / "t.json").write_text(other)
        with pytest.raises(InputError, match=r"t\.json looks like JSON but is not a list of strings"):
            read_lines(tmp_path / "t.json")

"""Questions for exploring a language model, and what is said of the result. tests/parity has the search itself."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from weightgen.explore import Explored, LanguageModel, Question, gain, read_questions

ONE = {"question": "The sky is", "choices": [" blue", " green"], "answer": 0}


def write(file, *rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_questions_are_read_in_order(tmp_path):
    file = write(tmp_path / "q.jsonl", ONE, "", ONE | {"answer": 1})
    assert read_questions(file) == [Question("The sky is", (" blue", " green"), n) for n in (0, 1)]


@pytest.mark.parametrize(
    "row",
    ["{", "[]", "null", ONE | {"answer": 2}, ONE | {"answer": -1}, ONE | {"answer": True}, ONE | {"answer": "0"},
     ONE | {"choices": [" blue"]}, ONE | {"choices": "ab"}, ONE | {"choices": [" blue", ""]}, ONE | {"choices": None},
     ONE | {"question": 1}, {"question": "a", "choices": ["b", "c"]}],
)  # fmt: skip
def test_what_is_no_question_is_named_by_its_line(row, tmp_path):
    with pytest.raises(InputError, match=r"q\.jsonl, line 2: not a question: write"):
        read_questions(write(tmp_path / "q.jsonl", ONE, row))


def test_a_file_without_questions_and_a_missing_one(tmp_path):
    with pytest.raises(InputError, match="has no question"):
        read_questions(write(tmp_path / "q.jsonl"))
    with pytest.raises(InputError, match="is not readable"):
        read_questions(tmp_path / "missing.jsonl")


def test_what_selects_does_not_test(tmp_path, capsys):
    file = str(write(tmp_path / "q.jsonl", ONE))
    command = ["explore", str(tmp_path), "--select", file, "--test", file, "--out", str(tmp_path / "out")]
    assert main(command) == 2 and not (tmp_path / "out").exists()
    assert "what selects must not test" in capsys.readouterr().err
    assert main([*command, "--share", "0"]) == 2 and "share is 0" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused():
    model = LanguageModel.__new__(LanguageModel)  # without transformers
    model.path, model.tokenizer = "folder", lambda text: {"input_ids": [ord(c) for c in text]}
    embeddings = SimpleNamespace(weight=np.zeros((ord("z"), 4)))
    model.model = SimpleNamespace(config=SimpleNamespace(), get_input_embeddings=lambda: embeddings)
    assert model._ids(Question("a", ("b", "c"), 0), "b") == ([97, 98], 1)
    with pytest.raises(InputError, match="folder: the tokenizer gives token 122, the model knows 122: give the model"):
        model._ids(Question("a", ("b", "z"), 0), "z")


def test_a_gain_counts_question_by_question():
    mine, other = np.array([True, True, False, True]), np.array([True, False, False, False])
    points, half = gain(mine, other)
    assert points == 50 and half == pytest.approx(196 * np.std([0, 1, 0, 1], ddof=1) / 2)
    assert gain(mine, mine) == (0, 0)


@pytest.mark.parametrize(("found", "said"), [((3.0, 2.9), "rows beat noise"), ((3.0, 3.1), "not better than noise")])
def test_the_sentence_needs_the_whole_interval(found, said):
    assert said in Explored({}, [], {}, {"rows - noise": found}).sentence()

"""A recipe file of a user's own: their dataclasses, their parts, data workers, and errors that name their line."""

import textwrap

import numpy as np
import pytest

from heirloom.common import config
from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.train.metrics import MetricsFile

RECIPE = '''
    """My own augmentation."""

    from __future__ import annotations

    from dataclasses import dataclass, field, replace

    from heirloom.common import config
    from heirloom.common.data.labelled import open_labelled
    from heirloom.common.data.pipeline import training_batches
    from learngene.config import Config
    from learngene.data import Example


    @dataclass(frozen=True)
    class Brighter:
        """Adds to every pixel."""

        amount: int = 10

        def __call__(self, example: dict) -> dict:
            return example | {"image": example["image"] + self.amount}


    @dataclass(frozen=True)
    class Both:
        """A record to an example, made brighter."""

        example: Example
        brighter: Brighter

        def __call__(self, record, rng):
            return self.brighter(self.example(record, rng))


    @dataclass(frozen=True, kw_only=True)
    class Mine(Config):
        brighter: Brighter = field(default_factory=Brighter)

        def parts(self):
            def batches(opened):
                source = open_labelled(self.data, self.label, self.student.classes)
                both = Both(Example(self.augment, self.pre, self.student.classes), self.brighter)
                return training_batches(source, self.pipeline, both, mesh=opened.mesh)

            return replace(super().parts(), batches=batches)


    def get_config() -> Mine:
        smoke = config.load("learngene/smoke")
        names = ("student", "data", "label", "held_out", "pipeline", "optim", "distill")
        shared = {name: getattr(smoke, name) for name in names}
        return Mine(**shared, steps=2, log_every=1, eval_every=2, save_every=2)
'''


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(RECIPE))
    return file


def test_a_users_dataclass_is_a_flag_and_works_in_data_workers(recipe, tmp_path, one_device):
    def train(run, *flags):
        small = [
            "--pipeline.batch",
            "8",
            "--optim.warmup",
            "0",
            "--student.width",
            "16",
            "--student.hidden",
            "16",
            "--student.heads",
            "2",
        ]
        assert main(["train", str(recipe), "--run", str(tmp_path / run), *small, *flags]) == 0
        return [line["loss"] for line in MetricsFile(tmp_path / run / "metrics.jsonl").lines()]

    here = train("here", "--pipeline.workers", "0")
    np.testing.assert_allclose(train("workers", "--pipeline.workers", "1"), here, rtol=1e-6)
    brighter = train("brighter", "--pipeline.workers", "0", "--brighter.amount", "90")
    assert abs(brighter[0] - here[0]) > 1e-4, "the flag of the user's own field reaches the data"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("replace(smoke, nonsense=1)", "nonsense"),  # raised inside the standard library
        ("1 // 0", "ZeroDivisionError"),
    ],
)
def test_an_error_names_the_recipes_line(recipe, wrong, complaint, capsys, tmp_path):
    text = recipe.read_text().replace("    shared = {", f"    {wrong}\n    shared = {{")
    recipe.write_text(text)
    line = text.splitlines().index(f"    {wrong}") + 1
    assert main(["train", str(recipe), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1 and f"{recipe}, line {line}:" in said


def test_two_recipes_of_one_file_name_keep_their_own_classes(recipe, tmp_path):
    other = tmp_path / "other" / recipe.name
    other.parent.mkdir()
    other.write_text(recipe.read_text().replace("amount: int = 10", "amount: float = 0.5"))
    first, second = config.load(str(recipe)), config.load(str(other))
    assert (first.brighter.amount, second.brighter.amount) == (10, 0.5)
    assert config.parse(first, ["--brighter.amount", "7"], "x").brighter.amount == 7
    with pytest.raises(InputError, match="amount"):
        # a whole number in the first file, whatever was loaded since
        config.parse(first, ["--brighter.amount", "0.7"], "x")

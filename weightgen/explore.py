"""`heirloom explore`: other weights around a language model, matrix by matrix, beside noise of the same norm.

There is no zoo: a proposal is a step from one checkpoint. Matrices are taken in the order of their signal-to-noise
ratio, the best share of each kind. What a selection set likes is kept, and only a second set, which selected nothing,
says what it is worth. transformers runs the model, of whatever architecture; nothing but the checkpoint is read.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from heirloom.common import config
from heirloom.common.checkpoint.hub import locate
from heirloom.common.data.lines import split_lines
from heirloom.common.errors import InputError, between, check_seed, positive
from heirloom.common.files import staged, write_json
from weightgen.metrics import Estimate
from weightgen.ranking import BUFFER, check_share, rank, top
from weightgen.search import Params, greedy, matched, noise_proposal, row_proposal


@dataclass(frozen=True)
class ExploreConfig:
    """Settings of the search around a language model."""

    share: float = 0.25
    """Of the matrices of each kind, those with the best signal-to-noise ratio that are searched."""
    candidates: int = 4
    """Proposals for each matrix."""
    step: float = 0.1
    """Norm of a proposal's difference, relative to the matrix."""
    latent: int = 32
    """Principal components of the rows of all searched matrices of one width, around which rows are drawn."""
    batch: int = 16
    """Answers scored at a time."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        positive(self, "candidates", "latent", "batch")
        between(self, "step")
        check_share(self.share)


@dataclass(frozen=True)
class Question:
    """A question with its answers, of which one is right."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(file: Path) -> list[Question]:
    """Read questions, a JSON object a line: {"question": "...", "choices": ["...", "..."], "answer": 0}.

    A choice continues the question as it stands, so that it usually begins with a space. Raises InputError naming the
    first line that is not such a question.
    """
    try:
        lines = split_lines(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not readable: {error}") from error
    found = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                question, choices, answer = row["question"], row["choices"], row["answer"]
                texts = isinstance(question, str) and isinstance(choices, list) and all(map(_is_text, choices))
                right = texts and type(answer) is int and 0 <= answer < len(choices) > 1
            except (ValueError, TypeError, KeyError, RecursionError):
                right = False
            if not right:
                raise InputError(f"{file}, line {n}: not a question: {_SHAPE}")
            one = Question(question, tuple(choices), answer)
            found.append(one)
    if not found:
        raise InputError(f"{file} has no question; {_SHAPE}")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_SHAPE = 'write {"question": "...", "choices": ["...", "..."], "answer": 0}, the answer as the number of a choice'


class LanguageModel:
    """A causal language model of transformers, whose tensors can be exchanged.

    source: hf:org/name, or a folder with its tokenizer. batch: answers scored at a time. tensors: {name: array},
    float32, what is explored. Raises InputError without transformers, for a folder that it cannot open, and for a
    checkpoint that does not have exactly the tensors of the model.
    """

    def __init__(self, source: str, batch: int) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise InputError("exploring runs the model: pip install 'heirloom-jax[torch]'") from error
        disable_progress_bar()
        self.path, self._batch = locate(source), batch
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            how: dict[str, Any] = dict(local_files_only=True, dtype="auto", output_loading_info=True)
            opened: Any = AutoModelForCausalLM.from_pretrained(self.path, **how)
        except Exception as error:  # transformers, safetensors and torch raise their own types
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{self.path}: transformers does not open it as a language model: {why}") from error
        self.model, told = opened
        # transformers draws at random what a checkpoint lacks, and leaves out what it does not know.
        for kind in ("missing", "mismatched", "unexpected"):
            found = map(str, told[f"{kind}_keys"])
            if keys := sorted(key for key in found if kind != "unexpected" or not BUFFER.search(key)):
                what = f"{len(keys)} {kind} tensors, such as {keys[0]}"
                raise InputError(f"{self.path} is not a whole {type(self.model).__name__}: {what}")
        self.model.eval()
        self._parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            copies = {name: p.to(torch.float32, copy=True) for name, p in self._parameters.items()}
        self.tensors: Params = {name: copy.numpy() for name, copy in copies.items()}
        self._now = dict(self.tensors)

    def put(self, tensors: Params) -> None:
        """Give the model these values, cast to the dtype in which it is stored."""
        import torch

        with torch.no_grad():
            for name, value in tensors.items():
                if self._now[name] is not value:
                    self._parameters[name].copy_(torch.tensor(value))
                    self._now[name] = value

    def right(self, questions: Sequence[Question]) -> np.ndarray:
        """Say which questions the model answers right [question], bool: by the likelihood of the whole choice."""
        rows = [self._ids(one, choice) for one in questions for choice in one.choices]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        scores = np.empty(len(rows))
        for part in (order[i : i + self._batch] for i in range(0, len(order), self._batch)):
            scores[part] = self._likelihood([rows[i] for i in part])
        ends = np.cumsum([len(one.choices) for one in questions])
        # A proposal may break the model: what is not a number is no answer.
        best = [int(np.argmax(part)) if np.isfinite(part).all() else -1 for part in np.split(scores, ends[:-1])]
        return np.array(best) == [one.answer for one in questions]

    def _ids(self, one: Question, choice: str) -> tuple[list[int], int]:
        """Token ids of the question with a choice, and where those of the choice begin."""
        whole, begin = (self.tokenizer(text)["input_ids"] for text in (one.question + choice, one.question))
        shared = next((i for i, (a, b) in enumerate(zip(whole, begin, strict=False)) if a != b), len(begin))
        longest = getattr(self.model.config, "max_position_embeddings", None) or len(whole)
        if len(whole) > longest:
            raise InputError(f"{len(whole)} tokens in {one.question[:40]!r}, the model takes {longest}: shorten it")
        if max(whole, default=0) >= (known := self.model.get_input_embeddings().weight.shape[0]):
            other = f"the tokenizer gives token {max(whole)}, the model knows {known}"
            raise InputError(f"{self.path}: {other}: give the model with its own tokenizer")
        if not 0 < shared < len(whole):
            raise InputError(f"{one.question[:40]!r}: a question and a choice need a token each; write more of either")
        return whole, shared

    def _likelihood(self, rows: Sequence[tuple[list[int], int]]) -> np.ndarray:
        import torch

        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        seen = torch.zeros_like(ids)
        for i, (row, _) in enumerate(rows):
            ids[i, : len(row)], seen[i, : len(row)] = torch.tensor(row), 1
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=seen).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double().numpy()
        return np.array([line[start - 1 : len(row) - 1].sum() for line, (row, start) in zip(each, rows, strict=True)])


@dataclass(frozen=True)
class Explored:
    """The model found with rows, the searched matrices, accuracies and what was kept, and gains on the test questions
    as [points, half of the 95 % interval].
    """

    params: Params
    names: list[str]
    rows: dict[str, dict[str, Any]]
    gains: dict[str, tuple[float, float]]

    def sentence(self) -> str:
        """Say whether rows beat noise on questions that selected nothing."""
        points, half = self.gains["rows - noise"]
        told = f"{points:+.1f} ± {half:.1f} points"
        if points - half > 0:
            return f"rows beat noise of the same norm on the test questions: {told}"
        return f"rows are not better than noise of the same norm on the test questions: {told}"


def explore(model: LanguageModel, select: Sequence[Question], test: Sequence[Question], how: ExploreConfig) -> Explored:
    """Search with both forms, from the same checkpoint and with as many trials."""
    names = [one.name for one in top(rank(model.tensors), how.share) if "@" not in one.name]
    if not names:
        raise InputError(f"{model.path}: no matrix can be searched; experts that are stored as one tensor are left out")
    base = model.tensors
    trials = len(names) * how.candidates
    print(f"{len(names)} matrices x {how.candidates} proposals, rows and noise: 2 x {trials} trials", flush=True)
    proposals = {
        "rows": matched(row_proposal({name: base[name] for name in names}, how.latent), how.step),
        "noise": noise_proposal(how.step),
    }

    def right(params: Params, questions: Sequence[Question]) -> np.ndarray:
        model.put(params)
        return model.right(questions)

    before = {"select": right(base, select), "test": right(base, test)}
    found: dict[str, Params] = {}
    rows: dict[str, dict[str, Any]] = {"base": {name: float(part.mean()) for name, part in before.items()}}
    tested = {"base": before["test"]}
    with Progress(transient=True) as progress:
        task = progress.add_task("exploring", total=2 * (trials + 1))  # each search scores the checkpoint again

        def selected(params: Params) -> float:
            progress.advance(task)
            return float(right(params, select).mean())

        for form, propose in proposals.items():
            result = greedy(base, names, propose, selected, how.candidates, how.seed)
            found[form], tested[form] = result.params, right(result.params, test)
            kept = [step.name for step in result.steps if step.kept]
            scores = {"select": result.score, "test": float(tested[form].mean())}
            rows[form] = scores | {"kept": kept, "trials": result.trials}
    model.put(base)
    pairs = (("rows", "base"), ("noise", "base"), ("rows", "noise"))
    gains = {f"{mine} - {other}": gain(tested[mine], tested[other]) for mine, other in pairs}
    return Explored(found["rows"], names, rows, gains)


def gain(mine: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the difference of two accuracies in points, and half of its 95 % interval, question by question."""
    found = Estimate.of(mine.astype(float) - other)
    return 100 * found.mean, 100 * found.half


def command(args: Namespace) -> dict[str, Any]:
    """Run `heirloom explore`; the flags left over are fields of `ExploreConfig`.

    Raises InputError for a file without questions, for questions in both files, and as `LanguageModel`.
    """
    how = config.parse(ExploreConfig(), args.flags, f"heirloom explore {args.what}")
    select, test = read_questions(args.select), read_questions(args.test)
    if both := {one.question for one in select} & {one.question for one in test}:
        what = f"{len(both)} questions of {args.test}, such as {min(both)[:40]!r}"
        raise InputError(f"{what}, are in {args.select}: what selects must not test")
    with staged(args.out, force=args.force) as folder:
        model = LanguageModel(args.what, how.batch)
        found = explore(model, select, test, how)
        sizes = {"select": len(select), "test": len(test)}
        about = {"source": args.what, "settings": asdict(how), "questions": sizes, "searched": found.names}
        about |= {"accuracy": found.rows, "gains": found.gains, "says": found.sentence()}
        folder.mkdir()
        write_json(folder / "explore.json", about)
        if found.rows["rows"]["kept"]:
            model.put(found.params)
            model.model.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
    for name, row in found.rows.items():
        kept = f"{len(row['kept'])} of {len(found.names)} matrices kept" if "kept" in row else ""
        print(f"{name:<6}select {100 * row['select']:5.1f} %   test {100 * row['test']:5.1f} %   {kept}".rstrip())
    print(found.sentence())
    print(f"{args.out}: {'the model found with rows, and ' if found.rows['rows']['kept'] else ''}explore.json")
    return about

"""What a zoo knows that one picture per class does not say: linear maps from zoos, on classes left out.

    python benchmarks/one_picture.py --json benchmarks/results/one_picture.json       # seven minutes of one CPU core

Why do generated heads of the demo hardly beat gradient descent on the pictures? A ridge map is the conditional mean
that diffusion samples around, and heads are convex, so it is what averaged samples tend to. Here a quarter of the
classes of the zoo is left out (twice), a zoo of 2,000 heads is built without them, and maps with several conditions are
held against gradient descent on 400 tasks of the classes left out; beside them averaged samples of a generator, as it
is and with what diffusion adds to the map drawn without the condition. The unseen classes of the demo are not looked
at.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import bench
from weightgen.baselines import Ridge, row_condition, with_bias
from weightgen.few_shot import SHOTS, Episodes, FewShotConfig, build_zoo, few_shot_heads, sample, train
from weightgen.metrics import Estimate, head_accuracy
from weightgen.zoo.data import Bank, EmojiTasks, emoji_tasks

TASKS, FOLDS = 400, 2


def main() -> None:
    parser = bench.parser(__doc__)
    args = parser.parse_args()
    rows = []
    for backend in ("embedded:emoji", "pixels"):
        tasks = emoji_tasks(backend)
        found: dict[tuple[int, str], list[np.ndarray]] = {}
        for fold in range(FOLDS):
            for key, values in judge(left_out(tasks, fold), fold).items():
                found.setdefault(key, []).append(values)
        for (shots, method), parts in found.items():
            gap = Estimate.of(np.concatenate(parts) - np.concatenate(found[shots, "gradient descent, penalty 0.3"]))
            mean = round(100 * float(np.concatenate(parts).mean()), 2)
            row = {"backend": backend, "pictures": shots, "method": method, "accuracy": mean}
            rows.append(row | {"over gradient descent": round(100 * gap.mean, 2), "ci95": round(100 * gap.half, 2)})
            print(rows[-1], flush=True)
    bench.write(args.json, {"tasks": TASKS * FOLDS, "rows": rows})


def left_out(tasks: EmojiTasks, fold: int) -> EmojiTasks:
    """The seen classes in two: three quarters for the zoo, one to judge by."""
    n = len(tasks.seen["support"].names)
    order = np.random.default_rng(100).permutation(n)
    held = sorted(order[fold * n // 4 : (fold + 1) * n // 4])
    rest = sorted(set(range(n)) - set(held))
    seen, out = ({part: some(bank, classes) for part, bank in tasks.seen.items()} for classes in (rest, held))
    return EmojiTasks(seen, out, tasks.projection)


def some(bank: Bank, classes: list[int]) -> Bank:
    x = np.concatenate([bank.features[bank.starts[c] : bank.starts[c + 1]] for c in classes])
    return Bank.of(x, np.repeat(np.arange(len(classes)), bank.counts[classes]), [bank.names[c] for c in classes])


def least_squares(support: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """Regularised least squares on the pictures. support: [task, class, picture, feature]; returns heads."""
    tasks, classes, shots, features = support.shape
    x = with_bias(support.reshape(tasks, classes * shots, features))
    y = np.repeat(np.eye(classes), shots, axis=0) - 1 / classes
    gram = x @ np.swapaxes(x, 1, 2) / features + penalty * np.eye(classes * shots)
    return np.swapaxes(np.linalg.solve(gram, np.broadcast_to(y, (tasks, *y.shape))), 1, 2) @ x


def direction(support: np.ndarray) -> np.ndarray:
    """Where a class lies from the mean of its task, at unit mean square."""
    offset = support.mean(2) - support.mean((1, 2))[:, None]
    return offset / np.sqrt((offset**2).mean(-1, keepdims=True) + 1e-6)


CONDITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ridge, as in the generator": lambda s: row_condition(s.mean(2)),
    "ridge, and directions": lambda s: np.concatenate([row_condition(s.mean(2)), direction(s)], -1),
    "ridge, from least squares alone": least_squares,
    "ridge, and directions and least squares": lambda s: np.concatenate(
        [row_condition(s.mean(2)), direction(s), least_squares(s)], -1
    ),
}


def judge(tasks: EmojiTasks, seed: int) -> dict[tuple[int, str], np.ndarray]:
    """Accuracies by (pictures of a class, method), [task]."""
    cfg = FewShotConfig(members=2000)
    zoo = build_zoo(cfg, tasks, 0)
    heads, classes = zoo.tokens(slice(None)), np.asarray(zoo.classes)
    episodes = Episodes.of(tasks.unseen, TASKS, cfg.ways, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        generator = train(cfg, zoo, tasks.seen["support"], folder=Path(folder), seed=0)
    found: dict[tuple[int, str], np.ndarray] = {}
    assert zoo.net is not None
    for shots in reversed(SHOTS):
        support = episodes.support[:, :, :shots]
        told = tasks.seen["support"].draw(classes, shots, np.random.default_rng(5))
        made = {}
        for name, condition in CONDITIONS.items():
            c, here = condition(told), condition(support)
            ridge = Ridge.fit(c.reshape(-1, c.shape[-1]), heads.reshape(-1, heads.shape[-1]), classes.reshape(-1))
            made[name] = ridge(here.reshape(-1, here.shape[-1])).reshape(*here.shape[:2], -1)
        for name, guidance in (("generated, averaged", 1.0), ("generated, averaged, no condition beyond the map", 0.0)):
            drawn = sample(
                cfg,
                replace(generator, how=replace(cfg.sample, guidance=guidance)),
                episodes.support,
                shots=shots,
                seed=0,
            )
            made[name] = drawn.mean(0)
        made["least squares on the pictures"] = least_squares(support)
        for penalty in (0.1, 0.3):
            few = replace(cfg.few, weight_decay=penalty)
            made[f"gradient descent, penalty {penalty}"] = few_shot_heads(support, few, zoo.spec, head=zoo.net)
        found |= {(shots, name): head_accuracy(h, *episodes.test) for name, h in made.items()}
    return found


if __name__ == "__main__":
    main()

"""The scores of one model on one data set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NOT_SHARES = ("loss", "mse", "mse_swapped", "psnr")  # metrics that are not printed in percent


def printed(metric: str, value: float) -> float:
    """Returns a metric as tables print it: shares in percent."""
    return value if metric in NOT_SHARES else 100 * value


@dataclass(frozen=True)
class Scored:
    """Metrics of one model on one data set of `n` examples. classes: number of different labels, 0 without labels."""

    dataset: str
    n: int
    metrics: Mapping[str, float]
    classes: int = 0

    def summary(self) -> dict[str, float]:
        """Returns the metrics for a line of progress; of retrieval only the means of both directions."""
        means = {name: value for name, value in self.metrics.items() if "_to_" not in name}
        return means or dict(self.metrics)

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row per metric for `heirloom eval`, shares in percent."""
        shown = {name: printed(name, value) for name, value in self.metrics.items()}
        shared = {"published": None, "n": self.n}
        return [{"dataset": self.dataset, "metric": name, "value": value} | shared for name, value in shown.items()]


Score = Callable[[Mapping[str, Any]], Scored]
"""`score(params)` evaluates a model. Raises InputError when its outputs are not finite."""

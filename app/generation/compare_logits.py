"""How far the predictions of two models are apart, summed over pieces of rows of logits."""

from __future__ import annotations

import math
from typing import Any

from app.core.errors import ErrorKind, WeftError

_ROWS = 16  # of which float64 copies are made at a time


class Comparison:
    """Sums over predictions. Needs numpy alone.

    Attributes:
        count: predictions so far. largest: logit difference. kl, largest_kl: in nats, summed and largest.
        agreed: predictions with the same likeliest token. nll_a, nll_b: sums of negative log-likelihoods, in nats.
    """

    def __init__(self) -> None:
        self.count = 0
        self.agreed = 0
        self.largest = self.kl = self.largest_kl = self.nll_a = self.nll_b = 0.0

    def add(self, a: Any, b: Any, targets: list[int]) -> None:
        """Take rows in.

        Args:
            a, b: float32 logits, [rows, vocabulary]. targets: the token that follows each row.

        Raises:
            WeftError: CORRUPT when a model computes what is no number.
        """
        import numpy

        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            x, y = (part[rows].astype(numpy.float64) for part in (a, b))
            for name, part in (("A", x), ("B", y)):
                if not numpy.isfinite(part.sum()):
                    raise WeftError(
                        ErrorKind.CORRUPT,
                        f"Model {name} computes values that are no numbers.",
                        "Check the model's files, and its adapters' weights.",
                    )
            self.largest = max(self.largest, float(numpy.abs(x - y).max()))
            self.agreed += int((x.argmax(1) == y.argmax(1)).sum())
            x -= _log_sum(x)
            y -= _log_sum(y)
            kl = (numpy.exp(x) * (x - y)).sum(1)
            self.kl += float(kl.sum())
            self.largest_kl = max(self.largest_kl, float(kl.max()))
            wanted = numpy.asarray(targets[rows])
            places = numpy.arange(len(wanted))
            self.nll_a -= float(x[places, wanted].sum())
            self.nll_b -= float(y[places, wanted].sum())
            self.count += len(wanted)

    def perplexities(self) -> tuple[float, float]:
        """Of A and B."""
        count = max(1, self.count)
        return math.exp(min(self.nll_a / count, 700.0)), math.exp(min(self.nll_b / count, 700.0))


def _log_sum(rows: Any) -> Any:
    import numpy

    top = rows.max(axis=1, keepdims=True)
    return top + numpy.log(numpy.exp(rows - top).sum(axis=1, keepdims=True))

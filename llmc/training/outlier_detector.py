"""How unusual a loss or gradient norm is among the last 128: its z-score (llm.c llmc/outlier_detector.h)."""

import math
from typing import Any

from llmc.files import parse

WINDOW = 128


class OutlierDetector:
    """A ring of the last WINDOW values with their running sum and sum of squares, in float64."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.at, self.sum, self.sum_squares = 0, 0.0, 0.0

    def update(self, value: float) -> float:
        """Take in a value; returns (value - mean) / std over the window that includes it, NaN for the first WINDOW."""
        if len(self.values) < WINDOW:
            self.values.append(value)
            self.sum += value
            self.sum_squares += value * value
            return math.nan
        old, self.values[self.at] = self.values[self.at], value
        self.at = (self.at + 1) % WINDOW
        self.sum += value - old
        self.sum_squares += value * value - old * old
        mean = self.sum / WINDOW
        std = math.sqrt(max(self.sum_squares / WINDOW - mean * mean, 0.0))
        return (value - mean) / std if std > 0 else 0.0

    def state(self) -> dict[str, Any]:
        """Everything as a dict that JSON can hold exactly; llm.c does not keep this in its checkpoints."""
        return dict(values=self.values, at=self.at, sum=self.sum, sum_squares=self.sum_squares)

    def load_state(self, state: dict[str, Any] | None, what: str = "the state") -> None:
        """Continue from state(); None, as of a checkpoint by llm.c, starts afresh. Errors: UserError about `what`."""
        if state is None:
            return
        found = parse.dictionary(state, what)
        values = parse.array(found.get("values"), f"{what}.values", WINDOW)
        self.values = [parse.number(value, f"{what}.values[{i}]") for i, value in enumerate(values)]
        self.at = parse.integer(found.get("at"), f"{what}.at", 0, WINDOW - 1)
        self.sum = parse.number(found.get("sum"), f"{what}.sum")
        self.sum_squares = parse.number(found.get("sum_squares"), f"{what}.sum_squares")

"""The sentence under the table: a difference counts where it exceeds the spread of at least three finished seeds."""

from __future__ import annotations

import math
import statistics

import pytest

from fngd.training.conclusion import conclude, half_width
from fngd.training.loop import Comparison
from fngd.training.settings import Config


def made(runs: dict[str, list[float]], *, epochs: int = 1, seconds: float = 2.0) -> Comparison:
    """A comparison with these final accuracies, a seed each; NaN for runs that diverged."""
    seeds = tuple(range(max(map(len, runs.values()))))
    config = Config(optimizers=tuple(runs), seeds=seeds, epochs=epochs)
    history = {
        name: {
            seed: [
                {
                    "train_loss": 0.1 if math.isfinite(value) else math.nan,
                    "test_accuracy": value if math.isfinite(value) else 10.0,
                    "seconds": seconds * (1 + number),
                }
            ]
            for seed, value in enumerate(values)
        }
        for number, (name, values) in enumerate(runs.items())
    }
    return Comparison(config, history)


def test_a_difference_beyond_the_spread_is_told_with_its_cost() -> None:
    told = conclude(made({"sgd": [80.0, 81.0, 82.0], "ngd": [82.0, 83.1, 84.0], "fngd": [79.0, 82.0, 82.5]}), "sgd")
    assert told.startswith(
        "Beside sgd, test accuracy differs by more than the spread over seeds: ngd +2.03 ± 0.14 points over 3 seeds, "
        "at 2.00 × the time of sgd. No difference from sgd beyond the spread: fngd +0.17"
    )
    assert "at 3.00 × the time of sgd" in told


def test_the_interval_is_students() -> None:
    values = [1.0, 1.4, 0.7, 1.1]
    assert half_width(values) == pytest.approx(3.182 * statistics.stdev(values) / 2)
    assert half_width([0.0] * 40 + [1.0]) == pytest.approx(2.228 * statistics.stdev([0.0] * 40 + [1.0]) / 41**0.5)
    assert half_width([1.0]) == math.inf


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"sgd": [80.0, 81.0], "ngd": [90.0, 91.0]}, "No conclusion: ngd has 2 finished seeds, and 3 are needed."),
        ({"sgd": [80.0], "ngd": [90.0]}, "No conclusion: ngd has 1 finished seed, and 3 are needed."),
        ({"sgd": [80.0, 81, 82], "ngd": [90.0, math.nan, 91]}, "No conclusion: ngd diverged in 1 of 3 runs."),
        (
            {"sgd": [80.0, math.nan, 82], "ngd": [90.0, 90, 91]},
            "No conclusion: sgd, to which the others are compared, diverged in 1 of 3 runs.",
        ),
        ({"sgd": [80.0, 81, 82]}, "No conclusion: sgd ran alone."),
    ],
)
def test_nothing_is_concluded_from(runs: dict[str, list[float]], message: str) -> None:
    assert conclude(made(runs), "sgd") == message


def test_seeds_that_are_not_finished_do_not_count() -> None:
    comparison = made({"sgd": [80.0] * 4, "ngd": [90.0] * 4}, epochs=2)
    assert "ngd has 0 finished seeds" in conclude(comparison, "sgd")

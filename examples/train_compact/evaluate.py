"""Print the tables of docs/figures/compact.md from predictions for images whose prompts the judging model never saw.

    python examples/train_compact/evaluate.py [--predictions FILE] [--json FILE]

Without --predictions it reads the file beside this script, which train.py wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from compare import evaluate
from predictions import Predictions

from aigiqa_reward.evaluation import Interval, bootstrap_interval, srcc
from aigiqa_reward.utils.io import write_atomically

NORMAL = {0.5: 0.6745, 0.8: 1.2816, 0.95: 1.96}
"""Half widths of central intervals of the normal distribution, in deviations."""


def coverage(table: Predictions, share: float) -> Interval:
    """How much of human quality lies in the interval that should hold this share of it."""
    assert table.predicted_uncertainty is not None, "train.py writes it"
    error = np.abs(table.target_quality - table.predicted_quality)
    inside = (error <= NORMAL[share] * table.predicted_uncertainty).astype(float)
    return bootstrap_interval(lambda rows, _: float(inside[rows].mean()), table.prompts)


def uncertainty(table: Predictions) -> str:
    """How well the expected deviation of quality fits the errors, as lines of Markdown."""
    assert table.predicted_uncertainty is not None, "train.py writes it"
    error = np.abs(table.target_quality - table.predicted_quality)
    agreement = srcc(table.predicted_uncertainty, error)
    lines = [f"- Quality within its {share:.0%} interval: {coverage(table, share)}" for share in NORMAL]
    middle = np.median(table.predicted_uncertainty)
    lines += [
        f"- Uncertainty: median {middle:.3f} of the benchmark's units; with the error's size, SRCC {agreement:.3f}",
    ]
    generators = np.array(table.generators)
    inside = error <= NORMAL[0.8] * table.predicted_uncertainty
    by_generator = [f"{name} {inside[generators == name].mean():.2f}" for name in sorted(set(table.generators))]
    return "\n".join([*lines, f"- Within the 80% interval, by generator: {', '.join(by_generator)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, default=Path(__file__).with_name("predictions.npz"))
    parser.add_argument("--json", type=Path, help="also write every figure and interval to this file")
    arguments = parser.parse_args()
    table = Predictions.load(arguments.predictions)
    report = evaluate(table)
    print(report.markdown())
    print(uncertainty(table))
    if arguments.json:
        write_atomically(arguments.json, json.dumps(report.as_dict(), indent=2).encode())


if __name__ == "__main__":
    main()

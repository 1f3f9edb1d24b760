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

from aigiqa_reward.evaluation import bootstrap_interval, srcc
from aigiqa_reward.utils.io import write_atomically


def apart(table: Predictions) -> str:
    """Show how far correspondence and quality are two scores, and what a wrong prompt changes, as lines of Markdown."""
    wrong, right = table.wrong_prompt_correspondence, table.predicted_correspondence
    assert wrong is not None and table.predicted_uncertainty is not None, "train.py writes them"

    def any_two(rows: np.ndarray, _: np.ndarray) -> float:
        return float((right[rows][:, None] > wrong[rows][None, :, 0]).mean())

    def wrong_agreement(rows: np.ndarray, _: np.ndarray) -> float:
        return srcc(wrong[rows, 0], table.target_correspondence[rows])

    generators, prompts = np.array(table.generators), np.array(table.prompts)
    within = [
        srcc(table.predicted_quality[rows], table.target_quality[rows])
        for rows in (generators == name for name in sorted(set(table.generators)))
    ]
    error = np.abs(table.target_quality - table.predicted_quality)
    lines = {
        "SRCC of correspondence and quality": f"{srcc(right, table.predicted_quality):.3f}; people's two scores "
        f"{srcc(table.target_correspondence, table.target_quality):.3f}",
        "Mean correspondence of right and of wrong prompts": f"{right.mean():.3f}, {wrong.mean():.3f}",
        "A right prompt's score above a wrong one's, over any two images": bootstrap_interval(any_two, prompts),
        "SRCC of correspondence with wrong prompts": bootstrap_interval(wrong_agreement, prompts),
        "Quality within one generator, mean SRCC": f"{np.mean(within):.3f}",
        "Expected error of quality, and its mean size": f"{table.predicted_uncertainty.mean():.3f}, {error.mean():.3f} "
        "of the benchmark's units",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, default=Path(__file__).with_name("predictions.npz"))
    parser.add_argument("--json", type=Path, help="also write every figure and interval to this file")
    arguments = parser.parse_args()
    table = Predictions.load(arguments.predictions)
    report = evaluate(table)
    print(report.markdown())
    print(apart(table))
    if arguments.json:
        write_atomically(arguments.json, json.dumps(report.as_dict(), indent=2).encode())


if __name__ == "__main__":
    main()

"""Print the table of the README from held-out predictions: every image judged by a model that never saw its prompt.

    python examples/train_compact/evaluate.py [--predictions FILE] [--json FILE]

Without --predictions it reads the file beside this script, which train.py wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from aigiqa_reward.evaluation import Predictions, evaluate
from aigiqa_reward.weights import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, default=Path(__file__).with_name("predictions.npz"))
    parser.add_argument("--json", type=Path, help="also write every figure and interval to this file")
    arguments = parser.parse_args()
    report = evaluate(Predictions.load(arguments.predictions))
    print(report.markdown())
    if arguments.json:
        write_atomically(arguments.json, json.dumps(report.as_dict(), indent=2).encode())


if __name__ == "__main__":
    main()

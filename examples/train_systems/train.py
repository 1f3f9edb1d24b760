"""Train the embedded heads of the five systems on all of AGIQA-3K, and write them into the package.

    python examples/train_systems/train.py --data DIR --cache features/

DIR holds data.csv and images/. A tenth of the prompts chooses the epoch; nothing is held out, so what the heads reach
is measured by `aigiqa-reward evaluate NAME --data agiqa3k:DIR`, which trains anew on each split. Prints each file's
size and hash, which aigiqa_reward/rewards/specs.py lists.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from aigiqa_reward.datasets import read_agiqa3k
from aigiqa_reward.rewards.build import SYSTEMS
from aigiqa_reward.training.by_name import TrainingPlan, train_reward, whole_split
from aigiqa_reward.utils.weights import ASSETS, sha256, write_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of AGIQA-3K with data.csv and images/")
    parser.add_argument("--cache", type=Path, required=True, help="folder for stored features")
    parser.add_argument("--only", choices=SYSTEMS, help="one system alone")
    arguments = parser.parse_args()
    images = read_agiqa3k(arguments.data)
    split = whole_split(images)
    for name in [arguments.only] if arguments.only else SYSTEMS:
        trained = train_reward(TrainingPlan(name=name, cache=arguments.cache), images, split, None)
        print(f"{name}: epoch {trained.result.best_epoch}, validation {trained.result.best:.3f}")
        kept = ("model.head.", "calibration.")
        tensors = {key: tensor for key, tensor in trained.reward.state_dict().items() if key.startswith(kept)}
        path = ASSETS / name / "model.safetensors"
        write_weights(path, tensors, dtype=torch.float16)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, sha256 {sha256(path)}", flush=True)


if __name__ == "__main__":
    main()

"""Train the systems of the zoo on human scores, and measure what they reach on splits that they have not seen.

Example:
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from aigiqa_reward.benchmark import Trained, TrainingPlan, train_reward, whole_split
    >>> from aigiqa_reward.datasets import read_table
    >>> from aigiqa_reward.training.recipes import Recipe
    >>> with open("scores.csv", "w") as file:
    ...     print("path,prompt,quality,generator", file=file)
    ...     for number in range(100):
    ...         Image.new("RGB", (64, 64), (2 * number, 0, 0)).save(f"{number}.png")
    ...         print(f"{number}.png,prompt {number // 2},{number},sd1.5", file=file)
    >>> images = read_table("scores.csv")
    >>> small = {"coarse_side": 64, "fine_side": 64}  # for these pictures; by default 256 and 512
    >>> plan = TrainingPlan(name="mst_clipiqa", settings=small, recipe=Recipe(epochs=1), cache=Path("features"))
    >>> trained: Trained = train_reward(plan, images, whole_split(images), Path("mine"), progress=False)
    >>> trained.reward.name, trained.result.best_epoch
    ('mst_clipiqa', 1)
    >>> from aigiqa_reward.benchmark import ProtocolSettings, run_protocol
    >>> settings = ProtocolSettings(seeds=1, ablation_seeds=0)
    >>> report = run_protocol(plan, images, settings, Path("runs"), title="mine", progress=False)
    >>> sorted({row.predictor for row in report.summary()})
    ["generator's mean score", 'model', 'ridge on the same features']
"""

from aigiqa_reward.benchmark.protocol import ABLATIONS, ProtocolSettings, run_protocol
from aigiqa_reward.benchmark.training import Trained, TrainingPlan, train_reward, whole_split

__all__ = ["ABLATIONS", "ProtocolSettings", "Trained", "TrainingPlan", "run_protocol", "train_reward", "whole_split"]

"""Train one system, from a name and human scores to a reward in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aigiqa_reward.datasets import PreferencePairs, ScoredImages, Split, group_split
from aigiqa_reward.datasets.splits import VALIDATION_FRACTION
from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.rewards.build import SYSTEMS, build_model, load_embedded
from aigiqa_reward.rewards.factory import create_reward, get_reward_spec
from aigiqa_reward.rewards.reward import Calibration, Reward
from aigiqa_reward.training.fit import FitResult, fit, predict
from aigiqa_reward.training.recipes import EMBEDDED, PUBLISHED, Recipe, option
from aigiqa_reward.training.store import MAX_BYTES, ImageSource, LiveImages, listed, store_features
from aigiqa_reward.training.tasks import PairTask, ScoreTask, Task
from aigiqa_reward.utils.run_folder import write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from aigiqa_reward.assistants import Assistants
    from aigiqa_reward.rewards.build import TowerConfig


DEFAULT_CACHE = Path("~/.cache/aigiqa-reward/features").expanduser()
"""Default folder of stored features."""

_RECIPE_HELP = (
    "Training recipe; by default the published one with preset paper or other towers, else the embedded head's."
)
_INIT_HELP = "Head to start from: embedded, or a folder of a saved reward; by default a fresh one."


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What to train and how.

    Example:
        >>> from pathlib import Path

        >>> from aigiqa_reward.training.recipes import Recipe
        >>> plan = TrainingPlan(name="mst_clipiqa", recipe=Recipe(epochs=3), cache=Path("features"))
        >>> plan.chosen_recipe.epochs
        3
    """

    name: str = field(metadata={"help": "Name of one of the five systems, or compact, which needs init."})
    preset: str | None = option(None, "paper for the published towers; by default the compact ones.")
    towers: Mapping[str, TowerConfig] = field(
        default_factory=dict, metadata={"help": "Other towers, by role, in place of the preset's."}
    )
    assistants: Assistants | None = field(
        default=None, metadata={"help": "Assistants in place of the offline substitutes."}
    )
    settings: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of the model's configuration that differ from the preset's."}
    )
    recipe: Recipe | None = field(default=None, metadata={"help": _RECIPE_HELP})
    init: str | Path | None = field(default=None, metadata={"help": _INIT_HELP})
    seed: int = option(0, "Random seed of initial weights and training.")
    cache: Path = field(default=DEFAULT_CACHE, metadata={"help": "Folder of stored features."})
    max_bytes: int = option(MAX_BYTES, "Maximum size of the stored features in bytes.")

    def __post_init__(self) -> None:
        if self.name not in (*SYSTEMS, "compact"):
            raise ValueError(f"name: expected one of {', '.join(SYSTEMS)} or compact, got {self.name!r}")
        if self.name == "compact" and self.init is None:
            raise ValueError(
                "init: expected 'embedded', or a folder of a saved reward, to continue compact from, got None; "
                "examples/train_compact fits it afresh"
            )
        if self.init is not None and (self.preset is not None or self.towers):
            raise ValueError("init: a trained reward brings its own towers; pass neither preset nor towers")

    @property
    def chosen_recipe(self) -> Recipe:
        """The recipe given, or the default one."""
        if self.recipe is not None:
            return self.recipe
        return PUBLISHED[self.name] if self.preset == "paper" or self.towers else EMBEDDED[self.name]

    def build(self) -> TrainedModel:
        """Build the model before training, with initial weights drawn from `seed`."""
        given: dict[str, Any] = {"assistants": self.assistants, "settings": self.settings}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.init is None:
                model = build_model(self.name, preset=self.preset, towers=self.towers, **given)
            elif self.init == "embedded":
                model = load_embedded(self.name, **given)
            else:
                model = Reward.from_pretrained(self.init, name=self.name, **given).model
        assert isinstance(model, TrainedModel), "every system has a head"
        return model

    def calibration(self) -> dict[str, Tensor]:
        """Return the map onto the human scale for a training without scores; without `init`, the identity."""
        if self.init is None:
            return Calibration().state_dict()
        if self.init == "embedded":
            return create_reward(self.name).calibration.state_dict()
        saved = Reward.from_pretrained(self.init, name=self.name, assistants=self.assistants, settings=self.settings)
        return saved.calibration.state_dict()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Result of `train_reward`: a reward on the scale where 1 is the best training score, and what it was fitted to."""

    reward: Reward
    task: Task
    source: ImageSource
    result: FitResult


def whole_split(data: ScoredImages | PreferencePairs, *, seed: int = 0) -> Split:
    """Take everything to train on, except a tenth of the groups that chooses the epoch; the test part is empty.

    Example:
        >>> from pathlib import Path

        >>> from aigiqa_reward.datasets import PreferencePairs
        >>> better, worse = ([Path(f"{name}{row}.png") for row in range(20)] for name in "ab")
        >>> prompts = tuple(f"prompt {row}" for row in range(20))
        >>> split = whole_split(PreferencePairs(prompts=prompts, better=tuple(better), worse=tuple(worse)))
        >>> len(split.train), len(split.validation), len(split.test)
        (18, 2, 0)
    """
    held = group_split(data.groups, VALIDATION_FRACTION, seed)
    return Split(train=np.flatnonzero(~held), validation=np.flatnonzero(held), test=np.zeros(0, dtype=np.int64))


def train_reward(
    plan: TrainingPlan,
    data: ScoredImages | PreferencePairs,
    split: Split,
    folder: Path | None,
    *,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    hub_model_id: str | None = None,
) -> Trained:
    """Train a system and save it as a reward in `folder`; a further call resumes an interrupted training.

    Args:
        plan: what to train and how.
        data: human scores, or preferences.
        split: rows of the data.
        folder: folder for `checkpoint`, the reward and `training.json`; None keeps nothing.
        accelerator: device, precision and processes.
        progress: whether to show bars on stderr.
        hub_model_id: repository "owner/name" on the Hugging Face Hub to upload the reward to; None uploads nothing.
    """
    if hub_model_id is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", hub_model_id):
        raise ValueError(f"hub_model_id: expected owner/name, got {hub_model_id!r}")
    model, recipe = plan.build(), plan.chosen_recipe
    if accelerator is not None:
        model.to(accelerator.device)
    task: Task = ScoreTask.of(data, split.train) if isinstance(data, ScoredImages) else PairTask(data)
    task.check_validation(split.validation)  # before the features are computed; fit checks the readable ones
    show = progress and (accelerator is None or accelerator.is_main_process)
    source: ImageSource
    if recipe.train_towers:
        source = LiveImages(task.paths, task.prompts, progress=progress)
    else:
        with nullcontext() if accelerator is None else accelerator.main_process_first():
            source = store_features(
                model, task.paths, task.prompts, plan.cache, max_bytes=plan.max_bytes, progress=show
            )
    given: dict[str, Any] = {"accelerator": accelerator, "progress": progress}
    result = fit(model, task, split, recipe, source, folder, seed=plan.seed, initialize=plan.init is None, **given)
    reward = Reward(model, get_reward_spec(plan.name))
    if isinstance(task, PairTask):
        reward.calibration.load_state_dict(plan.calibration())
    elif recipe.loss in ("pairwise", "none"):
        calibrate(reward, task, source, task.usable(split.train, source.readable))
    if accelerator is None or accelerator.is_main_process:
        if folder is not None:
            reward.save_pretrained(folder)
            planned = {"name": plan.name, "preset": plan.preset, "settings": dict(plan.settings), "seed": plan.seed}
            found = {"result": asdict(replace(result, unreadable=())), "unreadable": listed(result.unreadable)}
            write_json(folder / "training.json", {"plan": planned, "recipe": asdict(recipe), **found})
        if hub_model_id is not None:
            _upload(reward, hub_model_id, folder)
    return Trained(reward=reward, task=task, source=source, result=result)


def _upload(reward: Reward, hub_model_id: str, folder: Path | None) -> None:
    try:
        reward.push_to_hub(hub_model_id)
    except (OSError, ValueError) as error:  # all errors of huggingface_hub are one of the two
        saved = "" if folder is None else f"the reward is saved in {folder}, but "
        raise OSError(f"hub_model_id: {saved}it was not uploaded to {hub_model_id}: {error}") from error


def calibrate(reward: Reward, task: ScoreTask, source: ImageSource, rows: np.ndarray) -> None:
    """Map raw scores onto the human scale by least squares on the training part; order is kept.

    For losses that fix the order of scores and not their scale.
    """
    assert isinstance(reward.model, TrainedModel), "only trained systems are calibrated"
    predicted = predict(reward.model, task.prompts, source, rows, progress=False)
    for aspect, raw, column in zip(("quality", "correspondence"), predicted, task.targets.T, strict=True):
        target = column[rows]
        known = np.isfinite(target)
        if raw is not None and known.sum() > 1 and np.ptp(raw[known]) > 0:
            slope, shift = np.polyfit(raw[known].astype(np.float64), target[known], 1)
            if slope > 0:
                getattr(reward.calibration, aspect).copy_(torch.tensor([slope, shift]))

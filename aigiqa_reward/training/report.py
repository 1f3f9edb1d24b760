"""Train on several random splits, and measure the held-out predictions beside controls and ablations."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from aigiqa_reward.datasets import ScoredImages, Split, split_rows
from aigiqa_reward.evaluation import ProtocolReport, SplitScores, group_mean_predictor, ridge_predict, score_split
from aigiqa_reward.evaluation.protocol import GENERATOR, MODEL
from aigiqa_reward.evaluation.tables import TASKS
from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.training.by_name import Trained, TrainingPlan, train_reward
from aigiqa_reward.training.fit import predict_against
from aigiqa_reward.training.recipes import option
from aigiqa_reward.training.store import CONTEXT, FeatureStore, listed
from aigiqa_reward.utils.io import write_atomically
from aigiqa_reward.utils.run_folder import write_json

if TYPE_CHECKING:
    from accelerate import Accelerator


RIDGE = "ridge on the same features"
SHUFFLED = "model, shuffled prompts"
WRONG_PROMPTS = 4
"""Other prompts per test image for the AUC; the first of them is the shuffled control."""

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "mst_clipiqa": {"gate -> mean": {"fusion": "mean"}},
    "tsp_mgs": {"level prompts -> one prompt": {"levels": "one"}},
    "sc_agiqa": {"CSF weight -> mean": {"frequency": "mean"}, "experts -> one": {"experts": 1, "top": 1}},
    "ma_agiqa": {"LMM features -> zeros": {"semantics": "zeros"}},
    "cpa_iqa": {"three tiers -> the global one": {"tiers": ("global",)}},
}
"""Ablations of each system's key modules: a name for the table, and the settings that switch the module off."""


_MODE_HELP = (
    "Kind of split: group keeps the images of a prompt together; random_image and csv are for comparison with "
    "published figures."
)


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings:
    """Number and kind of the splits of a protocol.

    Example:
        >>> ProtocolSettings(seeds=2, ablation_seeds=0).describe()
        'groups (prompts) 80/20, 10 % of the training groups to choose the epoch; 2 seeds, ablations 0'
        >>> sorted(ABLATIONS)  # the systems whose modules a protocol switches off in turn
        ['cpa_iqa', 'ma_agiqa', 'mst_clipiqa', 'sc_agiqa', 'tsp_mgs']
    """

    seeds: int = option(10, "Number of random splits for the model and the controls.")
    ablation_seeds: int = option(3, "Number of random splits per ablation; 0 skips them.")
    mode: Literal["group", "random_image", "csv"] = field(default="group", metadata={"help": _MODE_HELP})
    file: Path | None = field(default=None, metadata={"help": "File of split assignments for mode csv."})
    same_generator: str | None = option(
        "sd1.5", "Prefix of the generators within whose variants the selection gain is also measured."
    )

    def __post_init__(self) -> None:
        if self.seeds < 1 or not 0 <= self.ablation_seeds <= self.seeds:
            got = f"{self.seeds} and {self.ablation_seeds}"
            raise ValueError(f"seeds, ablation_seeds: expected at least 1, and at most as many ablations, got {got}")

    def describe(self) -> str:
        """Return one line for the report's head."""
        kinds = {
            "group": "groups (prompts) 80/20, 10 % of the training groups to choose the epoch",
            "random_image": "single images 80/20 at random, prompts on both sides",
            "csv": f"split assignments of {self.file.name if self.file else 'a file'}",
        }
        return f"{kinds[self.mode]}; {self.seeds} seeds, ablations {self.ablation_seeds}"


def run_protocol(
    plan: TrainingPlan,
    images: ScoredImages,
    settings: ProtocolSettings,
    folder: Path,
    *,
    title: str,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> ProtocolReport:
    """Train and test on every split; a further call resumes after the splits that are finished in `folder`.

    On the same test images as the model are measured: ridge regression on the same frozen features (which sees no
    prompt, and so is the image-only control of correspondence), the generator's mean score in the training part, the
    model under other images' prompts, and each of `ABLATIONS`.

    Args:
        plan: what to train; its seed is replaced by the split's.
        images: images with scores.
        settings: number and kind of the splits.
        folder: folder for `report.json`, `unreadable.json` and `seed{n}.npz` with the model's predictions per seed.
        title: title of the report.
        accelerator: device and precision, in one process.
        progress: whether to show bars on stderr.
    """
    if plan.init is not None:
        raise ValueError("init: expected None, since a head that was trained before may have seen the test images")
    file = folder / "report.json"
    report = ProtocolReport.load(file) if file.exists() else ProtocolReport(title=title, protocol=settings.describe())
    if report.protocol != settings.describe():
        raise ValueError(f"folder: {file} is of another protocol ({report.protocol}); choose another folder")
    variants: dict[str, dict[str, Any]] = {MODEL: {}} | ABLATIONS[plan.name]
    for seed in range(settings.seeds):
        split = split_rows(images, mode=settings.mode, seed=seed, file=settings.file)
        for variant, changed in variants.items():
            skipped = variant != MODEL and seed >= settings.ablation_seeds
            if skipped or any(report.done(seed, variant, task) for task in TASKS):
                continue
            own = replace(plan, seed=seed, settings={**plan.settings, **changed})
            trained = train_reward(own, images, split, None, accelerator=accelerator, progress=progress)
            if accelerator is not None:
                accelerator.free_memory()  # it would hold every model that it prepared
            write_json(folder / "unreadable.json", listed(trained.source.unreadable))
            report = report.with_scores(_Test(images, split, trained, settings, seed).scores(variant, folder))
            report.save(file)
    return report


class _Test:
    """One trained model, its controls and the readable images of its split."""

    def __init__(
        self, images: ScoredImages, split: Split, trained: Trained, settings: ProtocolSettings, seed: int
    ) -> None:
        readable = trained.source.readable
        self.images, self.trained, self.settings, self.seed = images, trained, settings, seed
        self.rows, self.train = split.test[readable[split.test]], split.train[readable[split.train]]

    def scores(self, variant: str, folder: Path) -> list[SplitScores]:
        """Measure the model and, unless it is an ablation, the controls; write its predictions to `folder`."""
        images, rows, reward, source = self.images, self.rows, self.trained.reward, self.trained.source
        lists = [list(images.prompts), *(self._wrong_prompts() if images.has_correspondence else ())]
        assert isinstance(reward.model, TrainedModel), "it was trained"
        quality, against = predict_against(reward.model, lists, source, rows, progress=False)
        quality = reward.calibration(torch.from_numpy(quality), "quality").numpy()
        if against is not None:
            against = reward.calibration(torch.from_numpy(against), "correspondence").numpy()
        own = None if against is None else against[:, 0]
        wrong = against[:, 1:] if against is not None and len(lists) > 1 else None
        found: dict[str, dict[str, np.ndarray | None]] = {
            "quality": {variant: quality},
            "correspondence": {variant: own},
        }
        if variant == MODEL:
            arrays = {"quality": quality, "correspondence": own, "rows": rows, "wrong_prompt_correspondence": wrong}
            data = io.BytesIO()
            np.savez_compressed(data, **{name: a for name, a in arrays.items() if a is not None})
            write_atomically(folder / f"seed{self.seed}.npz", data.getvalue())
            if wrong is not None:
                found["correspondence"][SHUFFLED] = wrong[:, 0]
            for task in TASKS:
                found[task] |= self._controls(getattr(images, task))
        scores = (
            self._score(task, name, values, wrong if name == variant else None)
            for task, predictors in found.items()
            for name, values in predictors.items()
            if values is not None
        )
        return [score for score in scores if score is not None]

    def _wrong_prompts(self) -> list[list[str]]:
        """Draw K lists of prompts of all images, in which each test image has another prompt of the test part."""
        rng = np.random.default_rng([self.seed, 1])
        present = np.array(sorted({self.images.prompts[row] for row in self.rows}))
        lists = []
        for _ in range(WRONG_PROMPTS if len(present) > 1 else 0):
            prompts = list(self.images.prompts)
            for row in self.rows:
                others = present[present != self.images.prompts[row]]
                prompts[row] = str(others[rng.integers(len(others))])
            lists.append(prompts)
        return lists

    def _controls(self, target: np.ndarray) -> dict[str, np.ndarray | None]:
        """Predict by the generators' mean training scores, and by ridge regression on stored features."""
        images, rows, source = self.images, self.rows, self.trained.source
        known = self.train[np.isfinite(target[self.train])]
        if not len(known):
            return {}
        found: dict[str, np.ndarray | None] = {}
        names = np.array(images.generators)
        if set(names[rows]) <= set(names[known]):  # a generator that is not in training has no mean
            found[GENERATOR] = group_mean_predictor(target[known], names[known], names[rows])
        if isinstance(source, FeatureStore):
            features, groups = pooled_features(source), [images.groups[row] for row in known]
            found[RIDGE] = ridge_predict(features[known], target[known], features[rows], groups_train=groups)
        return found

    def _score(self, task: str, name: str, values: np.ndarray, wrong: np.ndarray | None) -> SplitScores | None:
        target = getattr(self.images, task)[self.rows]
        known = np.isfinite(target)
        if not known.any():
            return None
        kept = self.rows[known]
        return score_split(
            self.seed,
            name,
            task=task,
            predicted=values[known],
            target=target[known],
            prompts=[self.images.prompts[row] for row in kept],
            generators=[self.images.generators[row] for row in kept],
            same_generator=self.settings.same_generator,
            wrong_prompt=wrong[known] if wrong is not None and task == "correspondence" else None,
        )


def pooled_features(store: FeatureStore) -> np.ndarray:
    """Average the stored features of each image over crops and places, to one vector (N, D) for the ridge control.

    Of maps and of crops the standard deviation is taken as well; an assistant's features (floating, one vector per
    question) are concatenated, its flags and words left out.
    """
    parts = []
    for name, array in store.arrays.items():
        if not name.startswith(CONTEXT):
            pieces = [_pooled(array[start : start + 64]) for start in range(0, len(array), 64)]
            parts.append(np.concatenate(pieces))
        elif array.ndim == 3 and np.issubdtype(array.dtype, np.floating):
            parts.append(np.asarray(array, np.float32).reshape(len(array), -1))
    return np.concatenate(parts, axis=1).astype(np.float64)


def _pooled(block: np.ndarray) -> np.ndarray:
    values = block.astype(np.float32)
    if values.ndim == 2:
        return values
    # Channels: after the crops in maps (B, N, C, h, w) and (B, C, h, w), last in sequences (B, N, d).
    channel = {5: 2, 4: 1, 3: 2}[values.ndim]
    axes = tuple(axis for axis in range(1, values.ndim) if axis != channel)
    return np.concatenate([values.mean(axis=axes), values.std(axis=axes)], axis=1)

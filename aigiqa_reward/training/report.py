"""The protocol: train on several random splits, predict what was held out, beside the controls and the ablations."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from aigiqa_reward.datasets import ScoredImages, split_rows
from aigiqa_reward.evaluation import ProtocolReport, SplitScores, group_mean_predictor, ridge_predict, score_split
from aigiqa_reward.evaluation.protocol import GENERATOR, MODEL
from aigiqa_reward.training.by_name import Trained, TrainingPlan, train_reward
from aigiqa_reward.training.fit import predict_against
from aigiqa_reward.training.store import FeatureStore
from aigiqa_reward.utils.io import write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator


RIDGE = "ridge on the same features"
SHUFFLED = "model, shuffled prompts"
WRONG_PROMPTS = 4
"""Other prompts that each test image is held against for the AUC; the first of them is the shuffled control."""

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "mst_clipiqa": {"gate -> mean": {"fusion": "mean"}},
    "tsp_mgs": {"level prompts -> one prompt": {"levels": "one"}},
    "sc_agiqa": {
        "CSF weight -> mean": {"frequency": "mean"},
        "experts -> one": {"experts": 1, "top": 1},
    },
    "ma_agiqa": {"LMM features -> zeros": {"semantics": "zeros"}},
    "cpa_iqa": {"three tiers -> the global one": {"tiers": ("global",)}},
}
"""For each system, its key modules switched off: a name for the table, and the settings that do it."""


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings:
    """Number and kind of the splits of a protocol.

    Example:
        >>> ProtocolSettings(seeds=2, ablation_seeds=0).describe()
        'groups (prompts) 80/20, 10 % of the training groups to choose the epoch; 2 seeds, ablations 0'
        >>> sorted(ABLATIONS)  # the systems whose modules a protocol switches off in turn
        ['cpa_iqa', 'ma_agiqa', 'mst_clipiqa', 'sc_agiqa', 'tsp_mgs']
    """

    seeds: int = field(default=10, metadata={"help": "Number of random splits for the model and the controls."})
    ablation_seeds: int = field(default=3, metadata={"help": "Number of random splits per ablation; 0 skips them."})
    mode: Literal["group", "random_image", "csv"] = field(
        default="group",
        metadata={
            "help": "Kind of split: group keeps the images of a prompt together; random_image and csv are for "
            "comparison with published figures."
        },
    )
    file: Path | None = field(default=None, metadata={"help": "File of split assignments for mode csv."})
    same_generator: str | None = field(
        default="sd1.5",
        metadata={"help": "Prefix of the generators within whose variants the selection gain is also measured."},
    )

    def __post_init__(self) -> None:
        if self.seeds < 1 or not 0 <= self.ablation_seeds <= self.seeds:
            raise ValueError(
                f"seeds, ablation_seeds: expected at least 1, and at most as many for the ablations, got {self.seeds} "
                f"and {self.ablation_seeds}"
            )

    def describe(self) -> str:
        """One line for the report's head."""
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
    """Train and test on every split; what is finished stays in `folder`, and a further call goes on from there.

    Beside the model stand, on the same test images: ridge regression on the same frozen features (which sees no prompt,
    and so is the image-only control of correspondence), the generator's mean score in the training part, the model
    under other images' prompts, and each of `ABLATIONS`.

    Args:
        plan: what to train; its seed is replaced by the split's.
        images: with their scores.
        settings: how often, on which splits.
        folder: gets `report.json`, `unreadable.json` and, of each seed, `seed{n}.npz` with the model's predictions.
        title: of the report.
        accelerator: device and precision; of one process.
        progress: show bars on stderr.
    """
    if plan.init is not None:
        raise ValueError(
            "init: a head that was trained before may have seen the test images; pass None to the protocol"
        )
    file = folder / "report.json"
    folder.mkdir(parents=True, exist_ok=True)
    report = ProtocolReport.load(file) if file.exists() else ProtocolReport(title=title, protocol=settings.describe())
    if report.protocol != settings.describe():
        raise ValueError(f"folder: {file} is of another protocol ({report.protocol}); take another folder")
    variants: dict[str, dict[str, Any]] = {MODEL: {}} | ABLATIONS[plan.name]
    for seed in range(settings.seeds):
        for variant, changed in variants.items():
            if variant != MODEL and seed >= settings.ablation_seeds:
                continue
            if any(report.done(seed, variant, task) for task in ("quality", "correspondence")):
                continue
            own = replace(plan, seed=seed, settings={**plan.settings, **changed})
            scores = _one(own, images, settings, seed, variant, folder, accelerator, progress)
            report = report.with_scores(scores)
            report.save(file)
    return report


def _one(
    plan: TrainingPlan,
    images: ScoredImages,
    settings: ProtocolSettings,
    seed: int,
    variant: str,
    folder: Path,
    accelerator: Accelerator | None,
    progress: bool,
) -> list[SplitScores]:
    """Train one variant on one split, and score it and, beside the model, the controls."""
    split = split_rows(images, mode=settings.mode, seed=seed, file=settings.file)
    trained = train_reward(plan, images, split, None, accelerator=accelerator, progress=progress)
    if accelerator is not None:
        accelerator.free_memory()  # it would hold every model that it prepared
    left_out = [{"path": str(entry.path), "reason": entry.reason} for entry in trained.source.unreadable]
    write_atomically(folder / "unreadable.json", json.dumps(left_out, indent=1).encode())
    readable = trained.source.readable
    rows, train = split.test[readable[split.test]], split.train[readable[split.train]]
    lists = [list(images.prompts), *(_wrong_prompts(images, rows, seed) if images.has_correspondence else ())]
    quality, against = _predict(trained, lists, rows)
    predicted = {"quality": quality, "correspondence": None if against is None else against[:, 0]}
    wrong = against[:, 1:] if against is not None and len(lists) > 1 else None
    found = {"quality": {variant: predicted["quality"]}, "correspondence": {variant: predicted["correspondence"]}}
    if variant == MODEL:
        _save(folder / f"seed{seed}.npz", rows, predicted, wrong)
        if wrong is not None:
            found["correspondence"][SHUFFLED] = wrong[:, 0]
        features = pooled_features(trained.source) if isinstance(trained.source, FeatureStore) else None
        for task, target in (("quality", images.quality), ("correspondence", images.correspondence)):
            known = train[np.isfinite(target[train])]
            if not len(known):
                continue
            found[task][GENERATOR] = _generator_means(images, target, known, rows)
            if features is not None:
                groups = [images.groups[row] for row in known]
                found[task][RIDGE] = ridge_predict(features[known], target[known], features[rows], groups_train=groups)
    return [
        score
        for task, predictors in found.items()
        for name, values in predictors.items()
        if values is not None
        and (score := _scored(seed, name, task, values, images, rows, settings, wrong if name == variant else None))
    ]


def _scored(
    seed: int,
    name: str,
    task: str,
    values: np.ndarray,
    images: ScoredImages,
    rows: np.ndarray,
    settings: ProtocolSettings,
    wrong: np.ndarray | None,
) -> SplitScores | None:
    target = getattr(images, task)[rows]
    known = np.isfinite(target)
    if not known.any():
        return None
    kept = rows[known]
    return score_split(
        seed,
        name,
        task=task,
        predicted=values[known],
        target=target[known],
        prompts=[images.prompts[row] for row in kept],
        generators=[images.generators[row] for row in kept],
        same_generator=settings.same_generator,
        wrong_prompt=wrong[known] if wrong is not None and task == "correspondence" else None,
    )


def _predict(
    trained: Trained, prompts: Sequence[Sequence[str]], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Calibrated quality (M,), and correspondence (M, K) to each of K prompts."""
    model: Any = trained.reward.model
    quality, correspondence = predict_against(model, prompts, trained.source, rows, progress=False)

    def calibrated(raw: np.ndarray, aspect: str) -> np.ndarray:
        return trained.reward.calibration(torch.from_numpy(raw), aspect).numpy()

    return (
        calibrated(quality, "quality"),
        None if correspondence is None else calibrated(correspondence, "correspondence"),
    )


def _wrong_prompts(images: ScoredImages, rows: np.ndarray, seed: int) -> list[list[str]]:
    """K lists of prompts of all images, in which each test image has another prompt of the test part."""
    rng = np.random.default_rng([seed, 1])
    present = np.array(sorted({images.prompts[row] for row in rows}))
    lists = []
    for _ in range(WRONG_PROMPTS if len(present) > 1 else 0):
        prompts = list(images.prompts)
        for row in rows:
            others = present[present != images.prompts[row]]
            prompts[row] = str(others[rng.integers(len(others))])
        lists.append(prompts)
    return lists


def _generator_means(
    images: ScoredImages, target: np.ndarray, train: np.ndarray, rows: np.ndarray
) -> np.ndarray | None:
    names = np.array(images.generators)
    if not set(names[rows]) <= set(names[train]):
        return None  # a generator that training never showed has no mean
    return group_mean_predictor(target[train], names[train], names[rows])


def pooled_features(store: FeatureStore) -> np.ndarray:
    """(N, D) one vector per image for the ridge control: features averaged over crops and places.

    Of maps and of crops the deviation is taken as well, so that the control has what a linear head could have; an
    assistant's features (floating, one vector a question) stand side by side, its flags and words are left out.
    """
    parts = []
    for name, array in store.arrays.items():
        if name.startswith("context."):
            if array.ndim == 3 and np.issubdtype(array.dtype, np.floating):
                parts.append(np.asarray(array, np.float32).reshape(len(array), -1))
            continue
        pieces = [_pooled(array[start : start + 64]) for start in range(0, len(array), 64)]
        parts.append(np.concatenate(pieces))
    return np.concatenate(parts, axis=1).astype(np.float64)


def _pooled(block: np.ndarray) -> np.ndarray:
    values = block.astype(np.float32)
    if values.ndim == 2:
        return values
    # Channels: after the crops in maps (B, N, C, h, w) and (B, C, h, w), last in sequences (B, N, d).
    channel = {5: 2, 4: 1, 3: 2}[values.ndim]
    axes = tuple(axis for axis in range(1, values.ndim) if axis != channel)
    return np.concatenate([values.mean(axis=axes), values.std(axis=axes)], axis=1)


def _save(path: Path, rows: np.ndarray, predicted: Mapping[str, np.ndarray | None], wrong: np.ndarray | None) -> None:
    arrays = {name: values for name, values in predicted.items() if values is not None} | {"rows": rows}
    if wrong is not None:
        arrays["wrong_prompt_correspondence"] = wrong
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomically(path, data.getvalue())

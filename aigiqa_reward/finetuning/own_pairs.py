"""Pairs of a pipeline's own images, made before a training by preference begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning.checkpoints import checkpoints_in
from aigiqa_reward.finetuning.pairs import FILE, build_preference_pairs, read_preference_pairs
from aigiqa_reward.finetuning.randomness import seed_of
from aigiqa_reward.finetuning.settings import FinetuneSettings
from aigiqa_reward.finetuning.tools import Tools
from aigiqa_reward.reading import read_json
from aigiqa_reward.sampling.many_prompts import BestOfEachError


def own_pairs(
    tools: Tools, prompts: Sequence[str], folder: Path, settings: FinetuneSettings, *, progress: bool, **how: Any
) -> PreferencePairs:
    """Pairs of the pipeline's images, made into `folder`/pairs or found there.

    Args:
        tools: of the training.
        prompts: of which each has images.
        folder: of the training.
        settings: of the training; its seed gives other images than those of validation, whose seeds count from 0.
        progress: show a bar.
        **how: further arguments of `build_preference_pairs`.

    Warns:
        UserWarning: some prompts could not be sampled or ranked, or some pairs differ by the margin or less; they are
            missing.

    Raises:
        ValueError: checkpoints of a training on pairs of other prompts, or no pair above the margin.
        BestOfEachError: no prompt gave a pair.
    """
    made = folder / "pairs"
    if checkpoints_in(folder):
        _check_prompts(made, prompts)
    try:
        pairs = build_preference_pairs(
            tools.rollout.pipe,
            tools.reward,
            prompts,
            made,
            seed=seed_of(settings.seed, "pairs") >> 32,
            batch_size=settings.train_batch_size,
            accelerator=tools.accelerator,
            progress=progress,
            **how,
            **settings.sampling,
        )
    except ValueError as error:
        if str(error).startswith("out: "):  # as a folder of other settings
            error.add_note(f"n and top_k are DPO's candidates; to make the pairs anew, remove {made}")
        raise
    except BestOfEachError as error:
        try:
            pairs = read_preference_pairs(made)
        except ValueError:
            raise error from None  # there is none
        warnings.warn(f"{error}. Training takes the {len(pairs)} pairs of the others, in {made / FILE}", stacklevel=2)
        return pairs
    wanted = len(prompts) * how["pairs_per_prompt"]
    if len(pairs) < wanted and tools.accelerator.is_main_process:
        text = f"pairs: {len(pairs)} of {wanted} have rewards that differ by more than margin={how['margin']:g}"
        warnings.warn(f"{text}; training takes these, in {made / FILE}", stacklevel=2)
    return pairs


def _check_prompts(made: Path, prompts: Sequence[str]) -> None:
    """Refuse to extend what a checkpoint was trained on, which then could not go on as it was."""
    for note in (made / "settings.json", *sorted(made.glob("*/settings.json"))):
        if note.is_file() and (before := read_json(note)["prompts"]) != list(prompts):
            raise ValueError(
                f"prompts: {made} has the pairs of {len(before)} prompts that the checkpoints beside it are "
                f"trained on, and {len(prompts)} others are given; pass the same, or another output_dir"
            )

"""`finetune`: from a pipeline, a reward and training data to LoRA weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning.algorithms import ALGORITHMS
from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.algorithms.dpo import DPO
from aigiqa_reward.finetuning.callbacks import TrainingCallback
from aigiqa_reward.finetuning.checkpoints import find_checkpoint
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext, create_context, with_gradients
from aigiqa_reward.finetuning.logging import check_tracker
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.finetuning.optimizers import FinetuningError
from aigiqa_reward.finetuning.results import FinetuneResult
from aigiqa_reward.finetuning.trainer import Trainer
from aigiqa_reward.finetuning.validation import Validation, frozen, held_out, warn_of_weak
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.factory import as_reward
from aigiqa_reward.rewards.published import PUBLISHED
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.run_folder import reward_identity

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@with_gradients()
def finetune(
    pipe: DiffusionPipeline,
    reward: RewardFunction | str,
    train_data: Sequence[str] | PreferencePairs,
    algorithm: Algorithm,
    output_dir: str | Path,
    config: FinetuneConfig | None = None,
    validation_prompts: Sequence[str] = (),
    holdout: RewardFunction | str = "auto",
    callbacks: Sequence[TrainingCallback] = (),
    *,
    resume_from_checkpoint: str | Path | None = None,
    report_to: str | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune a pipeline's denoiser with LoRA so that its images get a higher reward.

    Every random choice depends on seed, step and row only: the result depends neither on how a batch is split nor on
    interruptions. Under `torchrun` and `accelerate launch` the processes share the batch of each step.

    Args:
        pipe: a text-to-image pipeline of a family in `sampling.families`. On return its weights are frozen and the
            adapter is loaded as "reward". Other adapters stay active in the reference model too, and are not saved.
        reward: a Reward, its name, or any function f(images, prompts) that returns (B,) scores; a module is frozen.
        train_data: training prompts, or preference pairs for DPO.
        algorithm: `DRaFT()`, `ReFL()`, `DPO()`, `DDPO()`, `FlowGRPO()` or `DiffusionNFT()`.
        output_dir: folder for `pytorch_lora_weights.safetensors`, `history.jsonl`, checkpoints, validations and plots.
        config: all other settings.
        validation_prompts: without them the last weights are kept, and reward hacking is not detected.
        holdout: another reward, or its name, by which the weights to keep are chosen; "auto": see `default_holdout`.
        callbacks: callbacks, which can stop the training.
        resume_from_checkpoint: "latest", or the name or path of a checkpoint; None starts anew.
        report_to: tracker of Accelerate ("tensorboard", "wandb").
        progress: whether to show a progress bar.
    """
    folder = Path(output_dir)
    config = _checked_config(algorithm, config, folder)
    algorithm = _with_pairs(algorithm, train_data)
    check_tracker(report_to)
    reward = as_reward(reward, pipe)
    held: Any = holdout if holdout == "auto" else as_reward(holdout, pipe, argument="holdout")
    prompts = _checked("train_data", train_data, reward) if algorithm.examples is None else list(algorithm.examples)
    context = create_context(pipe, frozen(reward), config, folder, report_to)
    with _adapter_removed_on_error(context.lora):
        validation = _validation(context, prompts, validation_prompts, held, folder, config)
        find_checkpoint(folder, resume_from_checkpoint)  # unusable folders must raise before hours of sampling
        repository = _create_repository(context, folder, config)
        algorithm.check(context, prompts)
        folder.mkdir(parents=True, exist_ok=True)
        algorithm = algorithm.ready(context, prompts, folder, config, progress=progress)
        prompts = prompts if algorithm.examples is None else list(algorithm.examples)
        watched = {"holdout_reward": _held(held, validation), "validation_prompts": list(validation_prompts)}
        trainer = Trainer(context, prompts, algorithm, folder, config, validation, watched, callbacks, progress)
        trainer.resume(resume_from_checkpoint, report_to)
    # After these two errors the pipeline has the kept weights.
    with context.gradient_checkpointing(), _adapter_removed_on_error(context.lora, FinetuningError, KeyboardInterrupt):
        result = trainer.run()
    if repository is not None:
        _upload(folder, repository)
    return result


def _held(holdout: RewardFunction | Literal["auto"], validation: Validation | None) -> str:
    """Return what a resumed training must have as its held-out reward."""
    if not isinstance(holdout, str):
        return reward_identity(holdout)
    # "auto" is another reward where the weights of a published one are missing.
    return holdout if validation is None or validation.holdout.name not in PUBLISHED else validation.holdout.name


def _validation(
    context: TrainingContext,
    trained: Sequence[str],
    prompts: Sequence[str],
    holdout: RewardFunction | Literal["auto"],
    folder: Path,
    config: FinetuneConfig,
) -> Validation | None:
    if not len(prompts):
        config.refuse_idle(("validation_steps", "validation_seeds", "patience"), "without validation_prompts")
        if holdout != "auto":
            raise ValueError(f"holdout: expected 'auto' without validation_prompts, got {holdout!r}; pass both")
        return None
    checked = _checked("validation_prompts", prompts, context.reward)
    if context.accelerator.is_main_process:
        warn_of_weak(checked, trained, config.validation_seeds)
    sizes = {"seeds": config.validation_seeds, "batch_size": config.train_batch_size}
    return Validation(context, checked, held_out(context, holdout), folder=folder / "validation", **sizes)


def _checked_config(algorithm: Algorithm, config: FinetuneConfig | None, folder: Path) -> FinetuneConfig:
    if not isinstance(algorithm, Algorithm):
        got = f"the class {algorithm.__name__}" if isinstance(algorithm, type) else repr(algorithm)
        calls = {kind.__name__.lower(): f"{kind.__name__}()" for kind in ALGORITHMS.values()}
        meant = difflib.get_close_matches(getattr(algorithm, "__name__", str(algorithm)).lower(), calls, 1, 0.4)
        hint = f"; did you mean {calls[meant[0]]}?" if meant else ""
        raise TypeError(f"algorithm: expected one of {', '.join(calls.values())}, got {got}{hint}")
    config = FinetuneConfig() if config is None else config
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"config: expected FinetuneConfig, got {type(config).__name__}")
    config.refuse_idle(algorithm.idle, f"with {algorithm.title}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {folder}; pass another path")
    return replace(config, kl_coeff=algorithm.kl_coeff) if config.kl_coeff is None else config


def _with_pairs(algorithm: Algorithm, train_data: Sequence[str] | PreferencePairs) -> Algorithm:
    if not isinstance(train_data, PreferencePairs):
        return algorithm
    if not isinstance(algorithm, DPO):
        name = type(algorithm).__name__
        raise TypeError(f"train_data: expected a list of prompts for {name}, got preference pairs; train with DPO()")
    return replace(algorithm, pairs=train_data)


def _checked(argument: str, prompts: Any, reward: RewardFunction) -> list[str]:
    """Return prompts as a list; refuse what the reward would refuse in the middle of the training."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"{argument}: expected a list of texts, got {type(prompts).__name__}")
    if other := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise TypeError(f"{argument}: expected texts, got {type(other[0]).__name__} ({other[0]!r})")
    blank = [place for place, prompt in enumerate(prompts) if not prompt.strip()]
    if blank or not len(prompts):
        what = f"a blank one at index {blank[0]}" if blank else "none"
        raise ValueError(f"{argument}: expected texts, got {what}; give one prompt per line, without empty lines")
    bound = BoundReward(reward)
    for start in range(0, len(prompts), 256):
        for why in bound.unreadable(prompts[start : start + 256]).values():
            raise ValueError(f"{argument}: expected texts that the reward can read: {why.removeprefix('prompts: ')}")
    return list(prompts)


@contextmanager
def _adapter_removed_on_error(lora: LoRA, *but: type[BaseException]) -> Iterator[None]:
    """Remove the adapter if anything is raised, so that the pipeline can be trained again."""
    try:
        yield
    except but:
        raise
    except BaseException:
        lora.remove()
        raise


def _create_repository(context: TrainingContext, folder: Path, config: FinetuneConfig) -> str | None:
    """Create the repository before the training, so that a missing login or permission raises at once."""
    if not (config.push_to_hub and context.accelerator.is_main_process):
        return None
    from huggingface_hub import create_repo

    name = config.hub_model_id or folder.resolve().name
    try:
        return create_repo(name, exist_ok=True).repo_id
    except Exception as error:
        raise ValueError(f"push_to_hub: cannot create {name} ({error}); log in with `hf auth login`") from error


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import upload_folder

    try:
        options = {"commit_message": "End of training", "ignore_patterns": ["checkpoint-*/**", ".*"]}
        upload_folder(repo_id=repository, folder_path=folder, **options)
    except Exception as error:
        raise FinetuningError(
            f"push_to_hub: the upload to {repository} failed ({error}); the weights are safe in {folder}; upload them "
            f"with `hf upload {repository} {folder}`"
        ) from error

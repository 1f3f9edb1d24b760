"""Callbacks of a training."""

from __future__ import annotations

from collections.abc import Mapping

from aigiqa_reward.finetuning.results import ValidationResult


class TrainingCallback:
    """Base class for callbacks of `finetune`, as `TrainerCallback` of transformers.

    A method that returns True stops the training after this step: a checkpoint is written, the best weights are kept,
    and `FinetuneResult.stopped` names the callback. With several processes the methods run in each of them.

    Example:
        >>> from aigiqa_reward import create_reward, load_embedded_pipeline
        >>> from aigiqa_reward.finetuning import DRaFT, FinetuneConfig, TrainingCallback, finetune
        >>> class StopAt(TrainingCallback):
        ...     def on_step_end(self, step, numbers):
        ...         return numbers["reward"] > -1.0
        >>> pipe, reward = load_embedded_pipeline(), create_reward("compact")
        >>> prompts = ["a red apple on a blue background"]
        >>> config = FinetuneConfig(max_train_steps=5, train_batch_size=1, sampling={"num_inference_steps": 1})
        >>> result = finetune(pipe, reward, prompts, DRaFT(), "out/", config, callbacks=[StopAt()], progress=False)
        >>> result.steps, result.stopped
        (1, 'step 1: StopAt.on_step_end returned True')
    """

    def on_step_end(self, step: int, numbers: Mapping[str, float]) -> bool | None:
        """Run after optimizer step `step`, from 1, with means over its batch (loss, reward, ...) and grad_norm."""

    def on_validation(self, step: int, result: ValidationResult) -> bool | None:
        """Run after a validation; `step` is the number of optimizer steps so far, 0 before the training."""

"""The training loop: steps, checkpoints, validations and what is kept at the end."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.batch import Batch, Schedule
from aigiqa_reward.finetuning.callbacks import TrainingCallback
from aigiqa_reward.finetuning.checkpoints import (
    Checkpoint,
    checkpoints_in,
    describe,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.early_stopping import Monitor
from aigiqa_reward.finetuning.interruptions import interruptions
from aigiqa_reward.finetuning.logging import History, show_picture
from aigiqa_reward.finetuning.lora import FILE
from aigiqa_reward.finetuning.optimizers import FinetuningError, Optimization
from aigiqa_reward.finetuning.reporting import draw_course
from aigiqa_reward.finetuning.results import FinetuneResult
from aigiqa_reward.finetuning.validation import Validation
from aigiqa_reward.utils.run_folder import differences


class Trainer:
    """The training loop; the arguments are those of `finetune`."""

    def __init__(
        self,
        context: TrainingContext,
        prompts: Sequence[str],
        algorithm: Algorithm,
        folder: Path,
        config: FinetuneConfig,
        validation: Validation | None,
        decisive: Mapping[str, Any],
        callbacks: Sequence[TrainingCallback],
        progress: bool,
    ) -> None:
        self.context, self.algorithm, self.folder, self.config = context, algorithm, folder, config
        self.lora, self.accelerator = context.lora, context.accelerator
        self.validation, self.callbacks = validation, callbacks
        processes = self.accelerator.num_processes
        part_size, parts = algorithm.split(config.train_batch_size, config.gradient_accumulation_steps, processes)
        self.schedule = Schedule(
            prompts=prompts,
            part_size=part_size,
            parts=parts,
            processes=processes,
            rows_per_prompt=algorithm.rows_per_prompt,
            round_of=algorithm.round_of,
            seed=config.seed,
        )
        rate, steps = config.learning_rate or algorithm.learning_rate, config.max_train_steps
        self.optimization = Optimization(self.lora, self.accelerator, config, rate)
        self.monitor = Monitor(patience=config.patience)
        self.settings = describe(context, algorithm, self.schedule, config, decisive)
        self.step = 0
        self._checked, self._settled = False, True
        self.memory: Mapping[str, Tensor] = {}
        self.kept: Mapping[str, Tensor] = {}
        self.finite: Mapping[str, Tensor] = {}  # without validation: the last weights that gave a finite loss
        self.stopped: str | None = None
        self.history = History(folder, self.accelerator, steps=steps, images=self.schedule.size, progress=progress)

    def resume(self, wanted: str | Path | None, report_to: str | None = None) -> None:
        """Restore a checkpoint, if one is wanted, and start a tracker, if one is."""
        with self.accelerator.main_process_first():
            path = find_checkpoint(self.folder, wanted)
            if path is None and self.accelerator.is_main_process and (earlier := self.folder / FILE).exists():
                earlier.replace(self.folder / f"{FILE}.before")  # weights without checkpoints are not overwritten
        if path is not None:
            self._restore(path)
        self.history.resume(self.step)
        if report_to:
            settings = {n: v if isinstance(v, int | float | str) else str(v) for n, v in self.settings.items()}
            self.accelerator.init_trackers("aigiqa-reward", config=settings)

    def _restore(self, path: Path) -> None:
        found, last = load_checkpoint(path, self.lora), self.config.max_train_steps
        if changed := differences(found.settings, self.settings):
            raise ValueError(
                f"resume_from_checkpoint: {path.name} was written with other settings ({'; '.join(changed)}); use "
                "the same settings, or choose another folder"
            )
        if found.step > last:
            raise ValueError(f"max_train_steps: expected at least the {found.step} steps of {path.name}, got {last}")
        self.lora.load(found.lora, source=str(path))
        self.optimization.load(found.optimization)
        self.monitor.load(found.monitor)
        self.context.old = found.old
        self.kept, self.step, self.stopped = found.kept, found.step, self.monitor.stop
        self.memory = {name: each[self.accelerator.process_index] for name, each in found.memory.items()}

    def run(self) -> FinetuneResult:
        """Train to the end, or until the training is stopped."""
        try:
            return self._run()
        except FinetuningError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._full(error) from error
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(
                    "lower train_batch_size= and raise gradient_accumulation_steps=, or gradient_checkpointing=True"
                )
            if self.step:
                error.add_note(self._rescued())
            raise

    def _run(self) -> FinetuneResult:
        last, every = self.config.max_train_steps, self.config.checkpointing_steps
        with interruptions(self.rescue) as noted:
            self.validate_if_due()
            while self.step < last and self.stopped is None:
                asked = self._try_step(noted)
                self.validate_if_due()
                ended = self.step == last or asked or self.stopped is not None
                if ended or (every and self.step % every == 0):
                    self.save()
                if asked and self.step < last:
                    self.finish()
                    raise KeyboardInterrupt
        return self.finish()

    def _try_step(self, noted: list[int]) -> bool:
        """Take a step; if its loss or gradient is not finite, keep the weights before it and raise."""
        try:
            return self.take_step(noted)
        except FinetuningError as error:
            which = "the weights of the best validation so far" if self.kept else "the weights before it"
            if self.finite:
                self.kept, which = self.finite, "the last weights that gave a finite loss"
            text = f"step {self.step + 1}: {error}; {which} are kept in {self.finish().folder}"
            raise FinetuningError(text) from error

    def take_step(self, noted: list[int]) -> bool:
        """Take an optimizer step, and return whether a process was interrupted."""
        batches = self.schedule.batches(self.step, self.accelerator.process_index)
        self.context.seen.clear()
        if not self._within_a_round:
            with torch.no_grad(), self.optimization.autocast():
                self.memory = self.algorithm.prepare(self.context, batches)
        finite, measured = self._gradients(batches)
        if finite and not self._checked:
            self._check_used()
        asked = self.optimization.gather(finite=finite, asked=bool(noted), broken=self.context.broken())
        if self.validation is None:
            with self.optimization.averaged():
                self.finite = self.lora.state()
        rate = self.optimization.learning_rate
        with self._changing():
            norm = self.optimization.step()
            self.step += 1
            self.context.old = self.algorithm.old_weights(self.context, self.step, self.memory)
        numbers = {**self.optimization.means(measured), "learning_rate": rate, "grad_norm": norm}
        self.history.step(self.step, numbers)
        if self.step == 1 and (share := numbers.get("above_ceiling", 0.0)) > 0.5:
            warnings.warn(
                f"reward_ceiling: {share:.0%} of the images of the first step score above {self.context.ceiling:g} and "
                "get no gradient; pass a higher one, or None",
                stacklevel=2,
            )
        self._call("on_step_end", [callback.on_step_end(self.step, numbers) for callback in self.callbacks])
        return asked

    def _check_used(self) -> None:
        """Warn once of adapted layers without a gradient, before those of the processes are summed."""
        self._checked = True
        if (unused := self.lora.unused()) and self.accelerator.is_main_process:
            text = f"the denoiser does not use {len(unused)} of the adapted layers, which stay untrained"
            warnings.warn(f"target_modules: {text}: {', '.join(unused)}; leave them out", stacklevel=2)

    @property
    def _within_a_round(self) -> bool:
        """Whether the last step and the next one are of the same round."""
        return self.step > 0 and self.algorithm.round_of(self.step - 1) == self.algorithm.round_of(self.step)

    def _gradients(self, batches: Sequence[Batch]) -> tuple[bool, dict[str, list[Tensor]]]:
        """Add the gradients of a step's losses; return whether the losses were finite, and what was measured."""
        if not (radius := self.algorithm.weight_ball):
            return self._pass(batches)
        with self.context.unpenalized():  # the worst weights are those of the reward
            finite, measured = self._pass(batches)
        self.optimization.gather(finite=finite, asked=False, broken=self.context.broken())
        self.context.seen.clear()
        with self.optimization.at_worst(radius):
            finite, moved = self._pass(batches)
        return finite, moved | {name: values for name, values in measured.items() if name != "loss"}

    def _pass(self, batches: Sequence[Batch]) -> tuple[bool, dict[str, list[Tensor]]]:
        measured: dict[str, list[Tensor]] = {}
        finite = [self._backward(batch, part, measured) for part, batch in enumerate(batches)]
        return all(finite), measured

    def _backward(self, batch: Batch, part: int, measured: dict[str, list[Tensor]]) -> bool:
        """Add the gradients of a batch's losses; return whether all losses were finite."""
        outcomes = self.algorithm.losses(self.context, batch, part, self.memory)
        sum_of_losses = torch.zeros((), device=self.accelerator.device)
        while True:
            with self.optimization.autocast():  # a generator's body runs here, not where it was created
                outcome = next(outcomes, None)
            if outcome is None:
                measured.setdefault("loss", []).append(sum_of_losses)
                return True
            sum_of_losses = sum_of_losses + outcome.loss.detach().to(sum_of_losses)
            if not bool(sum_of_losses.isfinite()):
                return False
            if not outcome.loss.requires_grad:
                raise ValueError("target_modules: the denoiser uses none of the adapted layers; name others")
            self.accelerator.backward(outcome.loss * (len(batch) / batch.size))
            for name, value in outcome.measures.items():
                measured.setdefault(name, []).append(value.detach().to(sum_of_losses).mean())

    def _call(self, method: str, answers: Sequence[bool | None]) -> None:
        """Stop if a callback of any process returned True."""
        names = [type(callback).__name__ for callback, answer in zip(self.callbacks, answers, strict=True) if answer]
        stop = bool(names)
        if self.callbacks and self.accelerator.num_processes > 1:
            flag = torch.tensor([float(stop)], device=self.accelerator.device)
            stop = bool(self.context.gather(flag).sum() > 0)
        if stop and self.stopped is None:
            self.stopped = f"step {self.step}: {', '.join(names) or 'a callback'}.{method} returned True"

    def validate_if_due(self) -> None:
        """Validate if this step wants it and did not have it, as one that was resumed from may not."""
        due = self.step == self.config.max_train_steps or self.step % self.config.validation_steps == 0
        if due and self.validation is not None and self.monitor.last_step != self.step:
            self.validate(self.validation)

    def validate(self, validation: Validation) -> None:
        """Validate, keep the weights if they are the best so far, and decide whether to stop."""
        with self.optimization.averaged():
            result = validation.run(self.step)
            with self._changing():
                self.monitor.add(self.step, result)
                if self.monitor.best_step == self.step:
                    self.kept = self.lora.state()
                    self._write()
        self.history.validation(self.step, result.summary())
        show_picture(self.accelerator, "validation/images", result.mosaic, self.step)
        self.stopped = self.stopped or self.monitor.stop
        self._call("on_validation", [callback.on_validation(self.step, result) for callback in self.callbacks])

    def _write(self) -> None:
        if self.accelerator.is_main_process:
            self.lora.write(self.folder, self.kept)

    def save(self, *, alone: bool = False) -> None:
        """Write a checkpoint; `alone` without waiting for other processes, whose part of a round it then lacks."""
        within = self.memory if self._within_a_round else {}  # at the end of a round nothing needs to be remembered
        rows = {name: tensor.to(self.accelerator.device)[None] for name, tensor in within.items()}
        memory = {name: (tensor if alone else self.context.gather(tensor)).cpu() for name, tensor in rows.items()}
        if self.accelerator.is_main_process:
            checkpoint = Checkpoint(
                step=self.step,
                settings=self.settings,
                monitor=self.monitor.state(),
                lora=self.optimization.settled(self.lora.state()),
                kept=self.kept,
                memory=memory,
                optimization=self.optimization.state(),
                old=self.context.old,
            )
            with self._changing():
                save_checkpoint(self.folder, checkpoint, self.lora, limit=self.config.checkpoints_total_limit)
        if not alone:
            self.accelerator.wait_for_everyone()

    def rescue(self) -> None:
        """Save the last whole step at once, within the next or a validation: a SIGTERM may come 30 s before a kill."""
        whole = self.accelerator.num_processes == 1 or not self._within_a_round
        if self._settled and self.step and whole:
            with suppress(OSError), torch.no_grad():  # the end of the step reports a full disk
                self.save(alone=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Context in which step and weights do not fit together, or a checkpoint is being written."""
        self._settled = False
        yield
        self._settled = True

    def finish(self) -> FinetuneResult:
        """Load the kept weights into the pipeline, write them, and close the logs."""
        if not self.kept:
            with self.optimization.averaged():
                self.kept = self.lora.state()
        self.lora.load(self.kept)
        self._write()
        self.history.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()  # end_training() would also end the process group, which a next training needs
        kept_step, lines = self.step if self.monitor.best_step is None else self.monitor.best_step, self.history.lines
        if self.accelerator.is_main_process and lines:
            draw_course(self.folder, lines, kept_step)
        return FinetuneResult(
            folder=self.folder, steps=self.step, kept_step=kept_step, stopped=self.stopped, history=tuple(lines)
        )

    def _full(self, error: OSError) -> FinetuningError:
        self.history.close()
        if self.kept:
            self.lora.load(self.kept)
        rest = "there is no checkpoint yet"
        for last in checkpoints_in(self.folder)[-1:]:
            rest = f"{last.name} is complete: free some space, and resume from it"
        return FinetuningError(f"step {self.step}: cannot write to {self.folder} ({error.strerror}); {rest}")

    def _rescued(self) -> str:
        """Save what a step that raised has left, and return where it is."""
        self.optimization.optimizer.zero_grad()
        if self.accelerator.num_processes == 1:  # the others would never arrive
            self.save()
        kept, there = self.finish().folder, checkpoints_in(self.folder)
        more = f"; resume from {there[-1].name} to continue" if there else ""
        return f"after step {self.step} of the training, whose weights are kept in {kept}{more}"

"""The loop that every algorithm shares, on Accelerate."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward.finetuning.algorithm import Algorithm, Batch
from aigiqa_reward.finetuning.checkpoints import (
    Checkpoint,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside,
)
from aigiqa_reward.finetuning.curves import draw_course
from aigiqa_reward.finetuning.history import History
from aigiqa_reward.finetuning.identity import describe
from aigiqa_reward.finetuning.interruption import Interruption
from aigiqa_reward.finetuning.monitor import Monitor
from aigiqa_reward.finetuning.optimisation import FinetuningError, Optimisation
from aigiqa_reward.finetuning.result import FinetuneResult
from aigiqa_reward.finetuning.schedule import Schedule
from aigiqa_reward.finetuning.settings import FinetuneSettings
from aigiqa_reward.finetuning.tools import Tools
from aigiqa_reward.finetuning.trackers import show_picture
from aigiqa_reward.finetuning.validation import Validation
from aigiqa_reward.sampling.run_settings import differences

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit that takes no more."""

_LESS = "lower train_batch_size and raise gradient_accumulation_steps by as much, or take gradient_checkpointing"


class Loop:
    """One fine-tuning, between whose steps everything can be written down.

    Args:
        tools: of the algorithm.
        prompts: to train on.
        algorithm: what gives the losses.
        folder: of the training.
        settings: everything else.
        validation: what looks at validation images; None keeps the last weights.
        decisive: what beside all these decides the outcome.
        progress: show a bar.
    """

    def __init__(
        self,
        tools: Tools,
        prompts: Sequence[str],
        algorithm: Algorithm,
        folder: Path,
        settings: FinetuneSettings,
        validation: Validation | None,
        decisive: Mapping[str, Any],
        *,
        progress: bool,
    ) -> None:
        self.tools, self.algorithm, self.folder, self.settings = tools, algorithm, folder, settings
        self.lora, self.accelerator, self.validation = tools.lora, tools.accelerator, validation
        self.schedule = Schedule(
            prompts=prompts,
            part_size=settings.train_batch_size,
            parts=settings.gradient_accumulation_steps,
            processes=self.accelerator.num_processes,
            rows_per_prompt=algorithm.rows_per_prompt,
            round_of=algorithm.round_of,
            seed=settings.seed,
        )
        rate = algorithm.learning_rate if settings.learning_rate is None else settings.learning_rate
        self.optimisation = Optimisation(self.lora, self.accelerator, settings, rate)
        self.monitor = Monitor(patience=settings.patience)
        self.known_settings = describe(tools, algorithm, self.schedule, settings, decisive)
        self.step = 0
        self.memory: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.good: dict[str, Tensor] = {}  # without validation: the last weights that gave a finite loss
        self.stopped: str | None = None
        self.history = History(
            folder, self.accelerator, steps=settings.max_train_steps, images=self.schedule.size, progress=progress
        )

    # ----------------------------------------------------------------------------------------- going on

    def _same(self, name: str, numbers: Mapping[str, Any]) -> None:
        if changed := list(differences(numbers["settings"], self.known_settings, [], [])):
            raise ValueError(
                f"resume_from_checkpoint: {name} was written with other settings ({'; '.join(changed)}); use "
                "those, or train into another folder"
            )
        if (taken := numbers["step"]) > (wanted := self.settings.max_train_steps):
            raise ValueError(f"max_train_steps: {name} has taken {taken} steps, more than {wanted}; pass more")

    def resume(self, wanted: str | Path | None, report_to: str | None = None) -> None:
        """Go on from a checkpoint, if one is wanted, and tell the settings to a tracker, if one is.

        Raises:
            ValueError: there is none, or it was written with other settings, which are listed.
        """
        with self.accelerator.main_process_first():
            path = find_checkpoint(self.folder, wanted)
            if path is None and self.accelerator.is_main_process:
                set_aside(self.folder)
        if path is not None:
            found = load_checkpoint(path, self.optimisation.inner, lambda numbers: self._same(path.name, numbers))
            self.lora.load(found.lora, source=str(path))
            self.optimisation.restore(found.numbers, found.average)
            self.monitor.load(found.numbers["monitor"])
            self.kept, self.step = dict(found.kept), found.step
            self.memory = {name: each[self.accelerator.process_index] for name, each in found.memory.items()}
            self.stopped = self.monitor.stop
        self.history.resume(self.step)
        if report_to:
            plain = (int, float, str, bool)
            settings = {name: v if isinstance(v, plain) else str(v) for name, v in self.known_settings.items()}
            self.accelerator.init_trackers("aigiqa-reward", config=settings)

    # ----------------------------------------------------------------------------------------- training

    def run(self) -> FinetuneResult:
        """Train to the end, or until something ends it.

        Raises:
            FinetuningError: a loss or a gradient is NaN, and the last weights that gave a finite loss are kept, or the
                best validation's; or the disk is full, and the last checkpoint is.
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
            Exception: whatever a reward or a pipeline raises, once a checkpoint is written, as a note to it says.
        """
        try:
            return self._run()
        except FinetuningError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise self._full(error) from error
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(_LESS)
            if self.step:
                error.add_note(self._rescued())
            raise

    def _full(self, error: OSError) -> FinetuningError:
        self.history.close()
        if self.kept:
            self.lora.load(self.kept)
        rest = "there is no checkpoint yet"
        if there := checkpoints_in(self.folder):
            rest = f"{there[-1].name} is whole: make room, and go on with resume_from_checkpoint='latest'"
        return FinetuningError(f"step {self.step}: {self.folder} takes no more ({error.strerror}); {rest}")

    def _rescued(self) -> str:
        """Write down what a step that raised has left, and say where it is."""
        self.optimisation.optimiser.zero_grad()
        if self.accelerator.num_processes == 1:  # others would be waited for
            self.save()
        kept, there = self.finish().folder, checkpoints_in(self.folder)
        more = f", and resume_from_checkpoint='latest' goes on from {there[-1].name}" if there else ""
        return f"after step {self.step} of the training, whose weights are kept in {kept}{more}"

    def _run(self) -> FinetuneResult:
        settings = self.settings
        with Interruption() as interruption:
            if self.step == 0:
                self.validate()
            while self.step < settings.max_train_steps and self.stopped is None:
                try:
                    asked = self.take_step(interruption)
                except FinetuningError as error:
                    which = "the weights of the best validation so far" if self.kept else "the weights before it"
                    if self.good:
                        self.kept, which = self.good, "the last weights that gave a finite loss"
                    text = f"step {self.step + 1}: {error}; {which} are kept in {self.finish().folder}"
                    raise FinetuningError(text) from error
                last = self.step == settings.max_train_steps
                if last or self.step % settings.validation_steps == 0:
                    self.validate()
                ended = last or asked or self.stopped is not None
                if ended or (settings.checkpointing_steps and self.step % settings.checkpointing_steps == 0):
                    self.save()
                if asked and not last:
                    self.finish()
                    raise KeyboardInterrupt
        return self.finish()

    def take_step(self, interruption: Interruption) -> bool:
        """One step of the optimiser; whether somebody asked to stop."""
        batches = self.schedule.batches(self.step, self.accelerator.process_index)
        if not self._within_a_round:
            with torch.no_grad(), self.optimisation.autocast():
                self.memory = dict(self.algorithm.prepare(self.tools, batches))
        numbers: dict[str, list[Tensor]] = {}
        finite = True
        for part, batch in enumerate(batches):
            finite &= self._backward(batch, part, numbers)
        asked = self.optimisation.gather(finite=finite, asked=interruption.asked)
        if self.validation is None:
            with self.optimisation.averaged():
                self.good = self.lora.state()
        rate, length = self.optimisation.learning_rate, self.optimisation.step()
        self.step += 1
        self.history.step(self.step, {**self.optimisation.means(numbers), "learning_rate": rate, "grad_norm": length})
        return asked

    @property
    def _within_a_round(self) -> bool:
        """Whether the step before is of the same round as the one to come."""
        before = self.step - 1
        return before >= 0 and self.algorithm.round_of(before) == self.algorithm.round_of(self.step)

    def _backward(self, batch: Batch, part: int, numbers: dict[str, list[Tensor]]) -> bool:
        """Gradients of a part's losses; whether all of them were finite."""
        outcomes = self.algorithm.losses(self.tools, batch, part, self.memory)
        sum_of_losses = torch.zeros((), device=self.accelerator.device)
        while True:
            with self.optimisation.autocast():  # an iterator's body runs here, not where it was made
                outcome = next(outcomes, None)
            if outcome is None:
                numbers.setdefault("loss", []).append(sum_of_losses)
                return True
            sum_of_losses = sum_of_losses + outcome.loss.detach().to(sum_of_losses)
            if not bool(sum_of_losses.isfinite()):
                return False
            self.accelerator.backward(outcome.loss * (len(batch) / batch.size))
            for name, value in outcome.measures.items():
                numbers.setdefault(name, []).append(value.detach().to(sum_of_losses).mean())

    # ----------------------------------------------------------------------------------------- keeping

    def validate(self) -> None:
        """Look at validation images, keep the weights if they are the best so far, and decide whether to go on."""
        if self.validation is None:
            return
        with self.optimisation.averaged():
            result = self.validation.run(self.step)
            self.monitor.add(self.step, result)
            if self.monitor.best_step == self.step:
                self.kept = self.lora.state()
                self._write()
        self.history.validation(self.step, result.summary())
        show_picture(self.accelerator, "validation/images", result.mosaic, self.step)
        self.stopped = self.monitor.stop

    def _write(self) -> None:
        if self.accelerator.is_main_process:
            self.lora.write(self.folder, self.kept)

    def save(self) -> None:
        """Write a checkpoint."""
        device = self.accelerator.device
        # Of each process; at a round's end there is nothing to remember.
        within = self.memory if self._within_a_round else {}
        memory = {name: self.tools.gather(tensor.to(device)[None]).cpu() for name, tensor in within.items()}
        if self.accelerator.is_main_process:
            checkpoint = Checkpoint(
                step=self.step,
                lora=self.lora.state(),
                average=self.optimisation.average.weights,
                kept=self.kept,
                memory=memory,
                numbers={
                    "settings": self.known_settings,
                    "monitor": self.monitor.state(),
                    **self.optimisation.numbers(),
                },
            )
            limit = self.settings.checkpoints_total_limit
            save_checkpoint(self.folder, checkpoint, self.lora, self.optimisation.inner, limit=limit)
        self.accelerator.wait_for_everyone()

    def finish(self) -> FinetuneResult:
        """Put the kept weights into the pipeline and at the top of the folder."""
        if not self.kept:
            with self.optimisation.averaged():
                self.kept = self.lora.state()
        self.lora.load(self.kept)
        self._write()
        self.history.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()  # end_training() would also part the processes, and this may not be the last training
        kept_step = self.step if self.monitor.best_step is None else self.monitor.best_step
        if self.accelerator.is_main_process and self.history.lines:
            draw_course(self.folder, self.history.lines, kept_step)
        return FinetuneResult(
            folder=self.folder,
            steps=self.step,
            kept_step=kept_step,
            stopped=self.stopped,
            history=tuple(self.history.lines),
        )

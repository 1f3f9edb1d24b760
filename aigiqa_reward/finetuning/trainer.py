"""`finetune`: from a pipeline, a reward and prompts to LoRA weights."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.batch import Batch, Schedule
from aigiqa_reward.finetuning.checkpoints import (
    Checkpoint,
    checkpoints_in,
    describe,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside,
)
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.early_stopping import Monitor
from aigiqa_reward.finetuning.logging import History, check_tracker, show_picture
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.finetuning.optimizers import FinetuningError, Optimization, accelerator_of
from aigiqa_reward.finetuning.reporting import draw_course
from aigiqa_reward.finetuning.results import FinetuneResult
from aigiqa_reward.finetuning.validation import Validation, default_holdout
from aigiqa_reward.rewards.bound import BoundReward, reward_name
from aigiqa_reward.rewards.reward import Reward
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.utils.checks import check_reward
from aigiqa_reward.utils.run_folder import differences, reward_identity


class Interruption:
    """A context in which the first interrupt is only noted.

    Attributes:
        asked: whether there was one.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\ninterrupted: stopping after this step; once more to stop now", file=sys.stderr, flush=True)


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
        tools: TrainingContext,
        prompts: Sequence[str],
        algorithm: Algorithm,
        folder: Path,
        settings: FinetuneConfig,
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
        self.optimization = Optimization(self.lora, self.accelerator, settings, rate)
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
        if changed := differences(numbers["settings"], self.known_settings):
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
            found = load_checkpoint(path, self.optimization.inner, lambda numbers: self._same(path.name, numbers))
            self.lora.load(found.lora, source=str(path))
            self.optimization.restore(found.numbers, found.average)
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
        self.optimization.optimizer.zero_grad()
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
        """One step of the optimizer; whether somebody asked to stop."""
        batches = self.schedule.batches(self.step, self.accelerator.process_index)
        if not self._within_a_round:
            with torch.no_grad(), self.optimization.autocast():
                self.memory = dict(self.algorithm.prepare(self.tools, batches))
        numbers: dict[str, list[Tensor]] = {}
        finite = True
        for part, batch in enumerate(batches):
            finite &= self._backward(batch, part, numbers)
        asked = self.optimization.gather(finite=finite, asked=interruption.asked)
        if self.validation is None:
            with self.optimization.averaged():
                self.good = self.lora.state()
        rate, length = self.optimization.learning_rate, self.optimization.step()
        self.step += 1
        self.history.step(self.step, {**self.optimization.means(numbers), "learning_rate": rate, "grad_norm": length})
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
            with self.optimization.autocast():  # an iterator's body runs here, not where it was made
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
        with self.optimization.averaged():
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
                average=self.optimization.average.weights,
                kept=self.kept,
                memory=memory,
                numbers={
                    "settings": self.known_settings,
                    "monitor": self.monitor.state(),
                    **self.optimization.numbers(),
                },
            )
            limit = self.settings.checkpoints_total_limit
            save_checkpoint(self.folder, checkpoint, self.lora, self.optimization.inner, limit=limit)
        self.accelerator.wait_for_everyone()

    def finish(self) -> FinetuneResult:
        """Put the kept weights into the pipeline and at the top of the folder."""
        if not self.kept:
            with self.optimization.averaged():
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


_AT_ONCE = 256
"""Prompts that a reward reads at once before the training."""


def finetune(
    pipe: Any,
    reward: Any,
    prompts: Sequence[str],
    algorithm: Algorithm,
    output_dir: str | Path,
    settings: FinetuneConfig | None = None,
    *,
    validation_prompts: Sequence[str] = (),
    holdout: Any | Literal["auto"] = "auto",
    resume_from_checkpoint: str | Path | None = None,
    report_to: str | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune a pipeline's denoiser with LoRA so that its images earn a higher reward.

    Every random choice comes from the settings' seed, the step and the row: a training depends neither on how its batch
    is split nor on interruptions. Under `torchrun` and `accelerate launch` the processes share each step's batch.

    Args:
        pipe: a text-to-image pipeline of a family that `sampling.families` lists. It is frozen, and afterwards holds
            the kept adapter, "reward", beside those that it held, which the reference has too and the file has not.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput`. It is frozen.
        prompts: to train on.
        algorithm: `DRaFT`, `ReFL`, `DPO`, `DDPO` or `FlowGRPO`.
        output_dir: holds `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`, `history.jsonl`,
            `checkpoint-<step>/`, `validation/` and pictures of its course.
        settings: everything else that decides the outcome.
        validation_prompts: on whose images reward and held-out reward are watched; without them the last weights are
            kept, and nothing guards against a hacked reward.
        holdout: a reward that is not trained on; "auto" takes an embedded system with another head.
        resume_from_checkpoint: "latest", or a checkpoint's name or path; None starts anew.
        report_to: a tracker of Accelerate ("tensorboard", "wandb").
        progress: show a progress bar.

    Warns:
        UserWarning: validation prompts that show little: trained on as well, or a single image.

    Raises:
        TypeError: an argument of a wrong type, or a pipeline without an adapter.
        ValueError: an argument that cannot be served; a folder of another training.
        FinetuningError: a loss became NaN; what was reached is on disk.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    settings, folder = _settings_and_folder(algorithm, settings, output_dir)
    texts = _checked("prompts", prompts) if algorithm.examples is None else list(algorithm.examples)
    check_tracker(report_to)
    tools = _tools(pipe, _frozen(check_reward(reward)), settings, folder, report_to)
    with _taken_off(tools.lora):
        _check_readable(tools.reward, "prompts", texts if algorithm.examples is None else [])
        algorithm.check(tools, texts)
        validation = _validation(tools, validation_prompts, texts, holdout, folder, settings)
        _begin(folder, resume_from_checkpoint)
        algorithm = algorithm.ready(tools, texts, folder, settings, progress=progress)
        texts = texts if algorithm.examples is None else list(algorithm.examples)
        watched = {"holdout_reward": _name_of(holdout), "validation_prompts": list(validation_prompts)}
        loop = Loop(tools, texts, algorithm, folder, settings, validation, watched, progress=progress)
        loop.resume(resume_from_checkpoint, report_to)
    with _checkpointed(tools), _taken_off(tools.lora, but=(FinetuningError, KeyboardInterrupt)):
        return loop.run()


def _settings_and_folder(algorithm: Any, settings: Any, output_dir: Any) -> tuple[FinetuneConfig, Path]:
    if not isinstance(algorithm, Algorithm):
        got = f"the class {algorithm.__name__}" if isinstance(algorithm, type) else repr(algorithm)
        raise TypeError(
            f"algorithm: expected DRaFT(), ReFL(), DPO(), DDPO() or FlowGRPO(), with settings of its own, got {got}"
        )
    settings = FinetuneConfig() if settings is None else settings
    if not isinstance(settings, FinetuneConfig):
        raise TypeError(
            f"settings: expected FinetuneConfig, got {type(settings).__name__}; pass FinetuneConfig(rank=8, ...)"
        )
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {folder}; pass another path")
    if settings.kl_coeff is None:
        settings = replace(settings, kl_coeff=algorithm.kl_coeff)
    return settings, folder


def _begin(folder: Path, resume_from_checkpoint: str | Path | None) -> None:
    """Refuse a folder of something else, before hours of sampling; then make it."""
    find_checkpoint(folder, resume_from_checkpoint)
    folder.mkdir(parents=True, exist_ok=True)


def _check_readable(reward: Any, argument: str, prompts: Sequence[str]) -> None:
    """Refuse before the first step what the reward would refuse in the midst of the training."""
    for start in range(0, len(prompts), _AT_ONCE):
        for why in BoundReward(reward).unreadable(prompts[start : start + _AT_ONCE]).values():
            raise ValueError(f"{argument}: expected texts that the reward reads: {why.removeprefix('prompts: ')}")


@contextmanager
def _taken_off(lora: LoRA, *, but: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Whatever is raised, take the adapter off first, so that the pipeline can be passed again.

    Args:
        lora: the adapter.
        but: what leaves the pipeline with the weights that were kept.
    """
    try:
        yield
    except but:
        raise
    except BaseException:
        lora.remove()
        raise


@contextmanager
def _checkpointed(tools: TrainingContext) -> Iterator[None]:
    """Denoiser and decoder compute their blocks again for the backward pass, where that is wanted; then as before."""
    denoiser, decoder = tools.lora.denoiser, tools.rollout.pipe.vae
    modules = [m for part in (denoiser, decoder) for m in part.modules() if hasattr(m, "gradient_checkpointing")]
    before = [(m.gradient_checkpointing, getattr(m, "_gradient_checkpointing_func", None)) for m in modules]
    if tools.checkpointed or getattr(denoiser, "is_gradient_checkpointing", False):
        # Blocks that are computed again must find the adapter as it was: the distance computes some without it.
        denoiser.enable_gradient_checkpointing(tools.lora.checkpoint)
    if tools.checkpointed and getattr(decoder, "_supports_gradient_checkpointing", False):
        decoder.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, (wanted, how) in zip(modules, before, strict=True):
            module.gradient_checkpointing, module._gradient_checkpointing_func = wanted, how


def _validation(
    tools: TrainingContext,
    prompts: Sequence[str],
    trained: Sequence[str],
    holdout: Any,
    folder: Path,
    settings: FinetuneConfig,
) -> Validation | None:
    if not len(prompts):
        return None
    checked = _checked("validation_prompts", prompts)
    _check_readable(tools.reward, "validation_prompts", checked)
    if tools.accelerator.is_main_process:
        _warn_of_weak(checked, trained, settings.validation_seeds)
    return Validation(
        tools,
        checked,
        seeds=settings.validation_seeds,
        holdout=_held_out(tools, holdout),
        folder=folder / "validation",
        batch_size=settings.train_batch_size,
    )


def _warn_of_weak(prompts: Sequence[str], trained: Sequence[str], seeds: int) -> None:
    """Tell of validation prompts that cannot show what they are there for."""
    known = set(trained)
    if both := [prompt for prompt in prompts if prompt in known]:
        warnings.warn(
            f"validation_prompts: {len(both)} of {len(prompts)} are trained on as well (first: {both[0]!r}), so that "
            "they do not show what the training does to other prompts; take others",
            stacklevel=4,
        )
    if len(prompts) * seeds == 1:
        warnings.warn(
            "validation_prompts: a single image shows no noise, so that no fall of the held-out reward can end the "
            "training; take eight prompts or more, or at least validation_seeds=2",
            stacklevel=4,
        )


def _held_out(tools: TrainingContext, holdout: Any) -> Any:
    if holdout == "auto":
        return _frozen(default_holdout(tools.reward, tools.rollout.family.device))
    trained = reward_identity(tools.reward)
    if holdout is tools.reward or (isinstance(holdout, nn.Module) and reward_identity(holdout) == trained):
        raise ValueError(
            f"holdout: expected a reward that is not trained on, got the trained one, {reward_name(tools.reward)}, "
            "which rises also where it is deceived; leave it out for an embedded system with another head"
        )
    return _frozen(check_reward(holdout))


def _tools(pipe: Any, reward: Any, settings: FinetuneConfig, folder: Path, report_to: str | None) -> TrainingContext:
    rollout = Rollout(pipe, need="fine-tuning", **settings.sampling)
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        raise ValueError(
            "pipe: its parts move between devices (CPU offload, device_map), which a backward pass cannot follow; load "
            "it on one device, and save memory with gradient_checkpointing and a smaller train_batch_size"
        )
    _check_precision(pipe, rollout.family.denoiser, settings)
    accelerator = accelerator_of(settings, folder, rollout.family.device, report_to)
    lora = LoRA(
        rollout.family,
        rank=settings.rank,
        alpha=settings.lora_alpha,
        targets=settings.target_modules,
        seed=settings.seed,
    )
    ceiling = settings.reward_ceiling
    if ceiling == "auto":
        ceiling = 1.0 if isinstance(reward, Reward) else None
    assert not isinstance(ceiling, str)
    assert settings.kl_coeff is not None
    return TrainingContext(
        rollout=rollout,
        lora=lora,
        reward=reward,
        accelerator=accelerator,
        checkpointed=settings.gradient_checkpointing,
        ceiling=ceiling,
        penalty=settings.kl_coeff,
    )


def _check_precision(pipe: Any, denoiser: nn.Module, settings: FinetuneConfig) -> None:
    """Refuse parts in float16 whose gradients nobody scales: the small ones would be 0, without a word."""
    for name, part in (("denoiser", denoiser), ("decoder", pipe.vae)):
        narrow = any(weight.dtype == torch.float16 for weight in part.parameters())
        if narrow and settings.mixed_precision != "fp16":
            raise ValueError(
                f"pipe: its {name} is in float16, in which small gradients vanish; load it in bfloat16 "
                "(torch_dtype=torch.bfloat16), or pass mixed_precision='fp16', which scales them"
            )


def _checked(argument: str, prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"{argument}: expected a list of texts, got {type(prompts).__name__}")
    if other := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise TypeError(f"{argument}: expected texts, got {type(other[0]).__name__} ({other[0]!r})")
    blank = [place for place, prompt in enumerate(prompts) if not prompt.strip()]
    if blank or not len(prompts):
        what = f"a blank one at place {blank[0]}" if blank else "none"
        raise ValueError(f"{argument}: expected texts, got {what}; give one prompt a line, without empty lines")
    return list(prompts)


def _name_of(holdout: Any) -> str:
    return holdout if isinstance(holdout, str) else reward_identity(holdout)


def _frozen(reward: Any) -> Any:
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval()
    return reward

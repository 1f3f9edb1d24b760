"""Best of N for many prompts, into a folder: over several processes, and going on where it was interrupted."""

from __future__ import annotations

import difflib
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aigiqa_reward.sampling.best_of_n import BestOfN
from aigiqa_reward.sampling.checks import check_text
from aigiqa_reward.sampling.results_folder import PromptResult, ResultsFolder
from aigiqa_reward.sampling.run_settings import describe

__all__ = ["BestOfEachError", "PromptResult", "ResultsFolder", "best_of_each"]

_NEUTRAL = "a photo"
"""A prompt to try arguments with, before any is given to the prompts of the run."""

_PAUSE = 0.2
"""Seconds between looks at what the other processes have finished; chosen here."""

_LISTED = 5

_DEPRECATED = ("callback", "callback_steps")
"""What a `**kwargs` of diffusers' own pipelines is for; all else in it they would ignore without a word."""


class BestOfEachError(RuntimeError):
    """Some prompts failed; the others are in the folder.

    Attributes:
        failures: why, by the prompt's number from 0.
        results: the folder.
    """

    def __init__(self, failures: Mapping[int, str], results: ResultsFolder) -> None:
        named = [f"prompt {i} ({results.prompts[i][:80]!r}): {why}" for i, why in failures.items()]
        more = f"; and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
        super().__init__(
            f"{len(named)} of {len(results)} prompts failed: {'; '.join(named[:_LISTED])}{more}. "
            f"The others are in {results.path}; the same call tries the failed ones again"
        )
        self.failures = dict(failures)
        self.results = results


def best_of_each(
    search: BestOfN,
    prompts: Sequence[str],
    out: str | Path,
    *,
    seed: Any = 0,
    accelerator: Any = None,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: bool | Callable[[int, int], object] = True,
    **pipe_kwargs: Any,
) -> ResultsFolder:
    """Run a BestOfN for each prompt and write what comes of it into a folder.

    The folder (see `sampling.results_folder`) holds results.jsonl with one candidate a line, the winners' images, and a
    record of each finished prompt. The same call again skips finished prompts; more may then have been added at the
    end. A prompt that fails is noted, and the others go on.

    Every prompt starts at the same `seed`: its result is that of `search(prompt, seed=seed, **pipe_kwargs)`, in any
    place. Under torchrun or `accelerate launch`, whose processes must share the folder, prompt i goes to process i
    modulo their number; each returns when all prompts are done.

    Args:
        search: its `batch_size` and `progress` may differ between runs into one folder, nothing else.
        prompts: texts, not blank.
        out: the folder, which need not exist.
        seed: of the first candidate of every prompt.
        accelerator: accelerate's Accelerator or PartialState; by default one is made where there are several
            processes. The pipeline and the reward are used where they are: put them on the process's device.
        overwrite: start anew in a folder of an earlier run, whose results are removed.
        settings: what else decides the outcome, as JSON, such as what `sampling.run_settings.describe` cannot see.
        progress: show a bar in the main process; or a function that is told there how many of how many are done.
        **pipe_kwargs: for the pipeline, as for `search`.

    Returns:
        The folder; iterating over it gives each prompt's result in the prompts' order.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument that cannot be used, or a folder of other settings: before anything is sampled.
        BestOfEachError: after the last prompt, if some failed.
        KeyboardInterrupt: what was sampled of the prompt at work is in the folder too; a rerun samples it again.
    """
    results = ResultsFolder(out, checked_prompts(prompts))
    _check_names(search.pipe, pipe_kwargs)
    described = describe(search, seed, settings or {}, pipe_kwargs)
    if not overwrite:
        results.check(described)
    search.stream(_NEUTRAL, seed, **pipe_kwargs).close()  # what is wrong with the arguments is said here
    processes = accelerator or _processes(search.pipe)
    if processes.is_main_process:
        results.prepare(described, overwrite=overwrite)
    processes.wait_for_everyone()  # only here: the shares may take hours, and collectives time out
    pending = [index for index in range(len(results)) if not results.finished(index)]
    mine = [index for index in pending if index % processes.num_processes == processes.process_index]
    run = _Run(search=search, results=results, seed=seed, pipe_kwargs=pipe_kwargs, leads=processes.is_main_process)
    run.do(mine, pending, progress)
    if failures := results.failures():
        raise BestOfEachError(failures, results) from run.first
    return results


@dataclass(kw_only=True)
class _Run:
    """One process's part of the work; `first` is the first error that a prompt of it failed with."""

    search: BestOfN
    results: ResultsFolder
    seed: Any
    pipe_kwargs: dict[str, Any]
    leads: bool
    first: Exception | None = None

    def do(self, mine: Sequence[int], pending: Sequence[int], progress: bool | Callable[[int, int], object]) -> None:
        """Sample this process's prompts, and wait for the others'."""
        try:
            self.work(mine, progress)
            self.wait(pending)
        except KeyboardInterrupt as error:
            done = sum(self.results.finished(index) for index in range(len(self.results)))
            of = f"{done} of {len(self.results)} prompts are finished in {self.results.path}"
            error.add_note(f"{of}; the same call goes on there")
            raise
        finally:
            if self.leads:
                self.results.write_results()

    def work(self, indices: Sequence[int], progress: bool | Callable[[int, int], object]) -> None:
        """Sample prompts, one after the other."""
        from tqdm.auto import tqdm

        n, total = self.search.n, self.search.n * len(indices)
        with tqdm(total=total, desc="best of n", disable=not (progress is True and self.leads and total)) as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)
                if callable(progress) and self.leads:
                    progress(done, total)

            for place, index in enumerate(indices):
                bar.set_postfix_str(f"prompt {place + 1} of {len(indices)}")
                self._sample(index, lambda done, before=place * n: show(before + done))
                show((place + 1) * n)
                if self.leads:
                    self.results.write_results()

    def _sample(self, index: int, show: Callable[[int], object]) -> None:
        output = None
        try:
            for output in self.search.stream(self.results.prompts[index], self.seed, **self.pipe_kwargs):
                show(len(output.all_seeds))
        except KeyboardInterrupt:
            self.results.write(index, output, finished=False)
            raise
        except Exception as error:
            self.first = self.first or error
            notes = " ".join(getattr(error, "__notes__", []))
            text = " ".join(part for part in (str(error), notes) if part)
            reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
            self.results.write(index, output, finished=False, error=reason)
        else:
            self.results.write(index, output, finished=True)

    def wait(self, indices: Sequence[int]) -> None:
        """Until all prompts were reached, by whichever process."""
        waiting = [index for index in indices if not self.results.reached(index)]
        while waiting:
            time.sleep(_PAUSE)
            left = [index for index in waiting if not self.results.reached(index)]
            if self.leads and len(left) < len(waiting):
                self.results.write_results()
            waiting = left


@dataclass(frozen=True)
class _Alone:
    """What accelerate would say of a single process."""

    process_index: int = 0
    num_processes: int = 1
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        pass


def _processes(pipe: Any) -> Any:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _Alone()
    from accelerate import PartialState

    device = getattr(pipe, "device", None)
    return PartialState(cpu=device is None or device.type == "cpu")


# --------------------------------------------------------------------------------------------- arguments


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list; refuses one text alone, none, and blank ones."""
    if isinstance(prompts, str):
        raise TypeError("prompts: expected several texts, got one; pass a list, [prompt]")
    texts = [check_text(text, f"prompts[{place}]", "leave blank ones out") for place, text in enumerate(prompts)]
    if not texts:
        raise ValueError("prompts: expected at least one text, got none")
    return texts


def _check_names(pipe: Any, pipe_kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline does not have, rather than fail with each prompt."""
    try:
        parameters = inspect.signature(pipe).parameters
    except ValueError:  # a callable without a signature
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if takes_any and not type(pipe).__module__.startswith("diffusers."):
        return
    for name in pipe_kwargs:
        if name not in parameters and not (takes_any and name in _DEPRECATED):
            meant = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {meant[0]!r}?" if meant else f"it has {', '.join(parameters)}"
            raise ValueError(f"{name}: {type(pipe).__name__} has no such argument; {hint}")

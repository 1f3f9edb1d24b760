"""Best of N for many prompts, into a folder: over several processes, and going on where it was interrupted."""

from __future__ import annotations

import difflib
import inspect
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from aigiqa_reward.images.loading import open_rgb
from aigiqa_reward.sampling.best_of_n import BestOfN
from aigiqa_reward.sampling.candidates import BestOfNOutput, Preview
from aigiqa_reward.utils.checks import check_text, integer
from aigiqa_reward.utils.io import read_json, read_regular, write_atomically
from aigiqa_reward.utils.run_folder import differences, identity, pipeline_identity, reward_identity


def describe(search: BestOfN, seed: Any, settings: Mapping[str, Any], pipe_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the outcome of a run, as JSON.

    Not seen are the code of a reward that is a function, what a reward asks beside its weights (assistants, a service),
    and weights of the pipeline that were changed in place or below the same path.
    """
    dtype = getattr(search.pipe, "dtype", None)
    return {
        **{name: identity(value) for name, value in settings.items()},  # first: none of them hides what is seen here
        **pipeline_identity(search.pipe),
        "dtype": None if dtype is None else str(dtype),
        "reward": reward_identity(search.reward),
        "n": search.n,
        "top_k": search.top_k,
        "pruning": None if search.pruning is None else repr(search.pruning),
        "search": "random" if search.search is None else repr(search.search),
        "diverse": search.diverse,
        "reward_prompt": search.reward_prompt,
        "seed": integer("seed", seed),
        "pipe_kwargs": {name: identity(value) for name, value in pipe_kwargs.items()},
    }


def _other_prompts(earlier: Sequence[str], prompts: Sequence[str]) -> Iterator[str]:
    """Say where another list of prompts differs, one phrase each; more prompts at the end are no difference."""
    if len(prompts) < len(earlier):
        yield f"prompts: {len(earlier)} there, {len(prompts)} now; more may be added at the end, none left out"
    changed = [place for place, (a, b) in enumerate(zip(earlier, prompts, strict=False)) if a != b]
    for place in changed[:_LISTED]:
        yield f"prompt {place}: {earlier[place][:80]!r} there, {prompts[place][:80]!r} now"
    if len(changed) > _LISTED:
        yield f"{len(changed) - _LISTED} more prompts"


_LISTED = 5

_Kinds = type | tuple[type, ...]

_NUMBER: _Kinds = (int, float, type(None))
_TEXT: _Kinds = (str, type(None))

_SEED = re.compile(r"-?[0-9]{1,20}")

_RECORD: dict[str, _Kinds] = {
    "prompt": str,
    "finished": bool,
    "error": _TEXT,
    "denoiser_calls": (int, type(None)),
    "candidates": list,
    "previews": dict,
}
_CANDIDATE: dict[str, _Kinds] = {
    "seed": int,
    "total": _NUMBER,
    "quality": _NUMBER,
    "correspondence": _NUMBER,
    "error": _TEXT,
    "rank": (int, type(None)),
    "image": _TEXT,
}
_PREVIEW: dict[str, _Kinds] = {
    "step": int,
    "steps": int,
    "total": _NUMBER,
    "quality": _NUMBER,
    "correspondence": _NUMBER,
}


def is_record(value: Any) -> bool:
    """Whether a JSON value has all parts of a record, each of its kind, and can be written as JSON again.

    Seeds, which name files, are integers of 64 bits, as torch has them; NaN and infinite numbers are not JSON.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    if not _has(value, _RECORD) or not all(_has(row, _CANDIDATE) for row in value["candidates"]):
        return False
    previews = value["previews"]
    return all(
        _SEED.fullmatch(seed) and isinstance(steps, list) and all(_has(step, _PREVIEW) for step in steps)
        for seed, steps in previews.items()
    )


def _has(value: Any, kinds: dict[str, _Kinds]) -> bool:
    return isinstance(value, dict) and all(name in value and _fits(value[name], kind) for name, kind in kinds.items())


def _fits(value: Any, kinds: _Kinds) -> bool:
    """Whether it is of one of these types, a truth value being no number, and as a number has at most 64 bits."""
    known = type(value) in (kinds if isinstance(kinds, tuple) else (kinds,))
    return known and (not isinstance(value, int) or -(2**63) <= value < 2**64)


def preview_of(told: dict[str, Any]) -> Preview:
    """A preview of a record; NaN for a reward that was none."""
    total, quality = (math.nan if told[name] is None else told[name] for name in ("total", "quality"))
    return Preview(
        step=told["step"], steps=told["steps"], total=total, quality=quality, correspondence=told["correspondence"]
    )


def finite(value: Any) -> Any:
    """With None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_FORMAT = "aigiqa-reward best of n for many prompts, version 1"
_SETTINGS, _RESULTS, _PROMPTS, _IMAGES, _NOISES = "settings.json", "results.jsonl", "prompts", "images", "noises"
_NOISE_BYTES = 1_000_000_000
"""Of a prompt's winners together: chosen here, above four hundred latents of 1024 px of any family."""

_OURS = re.compile(r"\d{5,}(\.json|_seed-?\d+\.png|\.safetensors)")


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """What became of one prompt.

    Attributes:
        index: the prompt's number, from 0.
        prompt: its text.
        finished: whether all its candidates were sampled; a rerun skips it then.
        error: why it failed, if it did.
        output: its candidates, or those that were reached; None without any.
    """

    index: int
    prompt: str
    finished: bool
    error: str | None
    output: BestOfNOutput | None


class ResultsFolder:
    """The folder, of which each prompt's result is read when it is asked for.

    Args:
        path: need not exist.
        prompts: all of them, in order.
    """

    def __init__(self, path: str | Path, prompts: Sequence[str]) -> None:
        self.path = Path(path)
        self.prompts = list(prompts)
        self._lines: dict[int, str] = {}

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    def __iter__(self) -> Iterator[PromptResult]:
        """The results that are there, in the prompts' order; a prompt that was not reached has none."""
        return (result for index in range(len(self)) if (result := self.read(index)) is not None)

    @classmethod
    def open(cls, path: str | Path) -> ResultsFolder:
        """A folder that an earlier run left, with that run's prompts.

        Raises:
            ValueError: it is none.
        """
        note = _note(Path(path))
        if note is None:
            raise ValueError(f"path: expected a folder that best_of_each wrote, got {path}; it has no {_SETTINGS}")
        return cls(path, note["prompts"])

    # ----------------------------------------------------------------------------------------- the whole

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder of somebody else, or of a run with other settings; nothing is written.

        Raises:
            ValueError: which files are in the way, or which settings differ.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.path}")
        note = _note(self.path)
        if note is None:
            for name in (_SETTINGS, _RESULTS, _PROMPTS, _IMAGES, _NOISES):
                if (self.path / name).exists():
                    raise ValueError(f"out: {self.path / name} is not of an earlier run; choose another folder")
            return
        differing = [*differences(note["settings"], settings), *_other_prompts(note["prompts"], self.prompts)]
        if differing:
            raise ValueError(
                f"out: {self.path} holds a run with other settings ({'; '.join(differing)}); use the same to go on, "
                "choose another folder, or start anew with overwrite"
            )

    def prepare(self, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Note the settings and forget prompts that were not finished, or all of them with `overwrite`.

        Raises:
            ValueError: a folder of somebody else.
        """
        if overwrite and _note(self.path) is not None:
            for folder in (_PROMPTS, _IMAGES, _NOISES):
                for file in (self.path / folder).glob("*"):
                    if _OURS.fullmatch(file.name):
                        file.unlink()
        else:
            self.check(settings)
        note = {"format": _FORMAT, "settings": settings, "prompts": self.prompts}
        write_atomically(self.path / _SETTINGS, json.dumps(note, indent=1, sort_keys=True).encode())
        for index in range(len(self)):
            if not self.finished(index):
                self.record_file(index).unlink(missing_ok=True)
        self.write_results()

    def write_results(self) -> None:
        """Put results.jsonl together from what is there."""
        for index in range(len(self)):
            if index not in self._lines and (record := self._record(index)) is not None:
                self._lines[index] = "".join(json.dumps(row, allow_nan=False) + "\n" for row in _rows(index, record))
        write_atomically(self.path / _RESULTS, "".join(self._lines[i] for i in sorted(self._lines)).encode())

    # ----------------------------------------------------------------------------------------- one prompt

    def write(self, index: int, output: BestOfNOutput | None, *, finished: bool, error: str | None = None) -> None:
        """Write a prompt's winners, then its record, each file whole or not at all."""
        images = {} if output is None else {s: self.image_file(index, s) for s in output.seeds}
        for seed, image in zip(images, () if output is None else output.images, strict=True):
            data = io.BytesIO()
            image.save(data, format="PNG")
            write_atomically(images[seed], data.getvalue())
        if output is not None and output.noises is not None:
            noises = zip(output.seeds, output.noises, strict=True)
            write_atomically(self._noises(index), save({str(seed): noise.contiguous() for seed, noise in noises}))
        record = {
            "prompt": self.prompts[index],
            "finished": finished,
            "error": error,
            "denoiser_calls": None if output is None else output.denoiser_calls,
            "candidates": [] if output is None else list(self._candidates(index, output)),
            "previews": {} if output is None else {s: [asdict(p) for p in ps] for s, ps in output.previews.items()},
        }
        write_atomically(self.record_file(index), json.dumps(finite(record), allow_nan=False).encode())
        for stale in set((self.path / _IMAGES).glob(f"{index:05d}_seed*.png")) - set(images.values()):
            stale.unlink()

    def read(self, index: int) -> PromptResult | None:
        """What became of a prompt; None where it was not reached, or what is there is damaged."""
        record = self._record(index)
        if record is None:
            return None
        try:
            output = self._output(index, record) if record["candidates"] else None
        except (OSError, ValueError, SafetensorError, KeyError, RuntimeError):  # an image or a noise is damaged
            return None
        return PromptResult(
            index=index,
            prompt=record["prompt"],
            finished=record["finished"],
            error=record["error"],
            output=output,
        )

    def reached(self, index: int) -> bool:
        """Whether there is a record of a prompt."""
        return self.record_file(index).is_file()

    def finished(self, index: int) -> bool:
        """Whether all of a prompt's candidates were sampled and its winners are there."""
        record = self._record(index)
        if record is None or not record["finished"]:
            return False
        winners = [row["seed"] for row in record["candidates"] if row["rank"] is not None]
        return all(self.image_file(index, seed).is_file() for seed in winners)

    def failures(self) -> dict[int, str]:
        """Why prompts failed, by number."""
        records = ((index, self._record(index)) for index in range(len(self)))
        return {index: record["error"] for index, record in records if record is not None and record["error"]}

    def record_file(self, index: int) -> Path:
        """Where a prompt's record lies: the last of its files to be written."""
        return self.path / _PROMPTS / f"{index:05d}.json"

    def image_file(self, index: int, seed: int) -> Path:
        """Where a winner's image lies."""
        return self.path / _IMAGES / f"{index:05d}_seed{seed}.png"

    # ----------------------------------------------------------------------------------------- parts

    def _noises(self, index: int) -> Path:
        return self.path / _NOISES / f"{index:05d}.safetensors"

    def _record(self, index: int) -> dict[str, Any] | None:
        try:
            record = read_json(self.record_file(index))
        except (OSError, ValueError):
            return None
        return record if is_record(record) and record["prompt"] == self.prompts[index] else None

    def _candidates(self, index: int, output: BestOfNOutput) -> Iterator[dict[str, Any]]:
        places = {seed: rank for rank, seed in enumerate(output.seeds, start=1)}
        known = output.all_correspondence or [None] * len(output.all_seeds)
        columns = zip(output.all_seeds, output.all_scores, output.all_quality, known, strict=True)
        for seed, total, quality, correspondence in columns:
            error = output.dropped.get(seed)
            if error is None and math.isinf(total):
                error = f"the reward gave {total}"
            yield {
                "seed": seed,
                "prompt": self.prompts[index],
                "total": total,
                "quality": quality,
                "correspondence": correspondence,
                "error": error,
                "prompt_index": index,
                "rank": places.get(seed),
                "image": f"{_IMAGES}/{self.image_file(index, seed).name}" if seed in places else None,
                "pruned": error is None and math.isnan(total),
            }

    def _output(self, index: int, record: dict[str, Any]) -> BestOfNOutput:
        rows = record["candidates"]
        winners = sorted((row for row in rows if row["rank"] is not None), key=lambda row: row["rank"])
        known = any(row["correspondence"] is not None for row in rows)
        noises = self._noises(index)
        by_seed = load(read_regular(noises, most=_NOISE_BYTES)) if noises.exists() else None

        def column(name: str, rows: Sequence[dict[str, Any]]) -> list[float]:
            return [math.nan if row[name] is None else row[name] for row in rows]

        return BestOfNOutput(
            images=[open_rgb(self.image_file(index, row["seed"])) for row in winners],
            scores=column("total", winners),
            seeds=[row["seed"] for row in winners],
            quality=column("quality", winners),
            correspondence=column("correspondence", winners) if known else None,
            all_scores=column("total", rows),
            all_seeds=[row["seed"] for row in rows],
            all_quality=column("quality", rows),
            all_correspondence=column("correspondence", rows) if known else None,
            dropped={row["seed"]: row["error"] for row in rows if row["error"] is not None},
            previews={int(s): tuple(map(preview_of, steps)) for s, steps in record["previews"].items()},
            denoiser_calls=record["denoiser_calls"],
            noises=None if by_seed is None else [by_seed[str(row["seed"])] for row in winners],
        )


def _note(folder: Path) -> dict[str, Any] | None:
    """The settings that a folder was written with, if it is one of ours."""
    try:
        note = read_json(folder / _SETTINGS)
    except (OSError, ValueError):
        return None
    if not isinstance(note, dict) or note.get("format") != _FORMAT:
        return None
    prompts = note.get("prompts")
    if not isinstance(note.get("settings"), dict) or not isinstance(prompts, list):
        return None
    return note if all(isinstance(prompt, str) for prompt in prompts) else None


def _rows(index: int, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = list(record["candidates"])
    if record["error"]:
        scores = dict.fromkeys(("total", "quality", "correspondence"))
        place = {"prompt_index": index, "rank": None, "image": None, "pruned": False}
        rows.append({"seed": None, "prompt": record["prompt"], **scores, "error": record["error"], **place})
    return [{**row, "finished": record["finished"]} for row in rows]


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

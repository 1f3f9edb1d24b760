"""Best of N for many prompts, into a folder: over several processes, and resumed where it was interrupted."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm.auto import tqdm

from aigiqa_reward.images.loading import open_rgb
from aigiqa_reward.images.metadata import png
from aigiqa_reward.sampling.best_of_n import BestOfN
from aigiqa_reward.sampling.candidates import BestOfNOutput, Preview
from aigiqa_reward.types import PromptError
from aigiqa_reward.utils.checks import check_text, integer
from aigiqa_reward.utils.io import read_json, read_regular, write_atomically
from aigiqa_reward.utils.run_folder import RunFolder, differences, identity, pipeline_identity, reward_identity, to_json

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from PIL import Image

__all__ = ["BestOfEachError", "PromptResult", "ResultsFolder", "best_of_each"]

_RESULTS, _PROMPTS, _IMAGES, _NOISES, _SMALL = "results.jsonl", "prompts", "images", "noises", "thumbnails"
_NOISE_BYTES = 1_000_000_000  # largest file of noises that is read: more than 400 latents of 1024 px of any family
_LISTED = 5  # prompts that an error lists; the rest are counted
_PAUSE = 0.2  # seconds between looks at what the other processes have finished
_DEPRECATED = ("callback", "callback_steps")  # all that a `**kwargs` of diffusers' own pipelines takes


def describe(search: BestOfN, seed: int, settings: Mapping[str, Any], pipe_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the result of a run, as JSON.

    Not covered are the code of a reward that is a function, and anything that a reward uses besides its weights
    (assistants, a service).
    """
    return {
        **{name: identity(value) for name, value in settings.items()},  # first, so that they replace none of the rest
        **pipeline_identity(search.pipe),
        "reward": reward_identity(search.reward),
        **{name: getattr(search, name) for name in ("n", "top_k", "diverse", "keep", "reward_prompt")},
        "pruning": None if search.pruning is None else repr(search.pruning),
        "search": "random" if search.search is None else repr(search.search),
        "seed": integer("seed", seed),
        "pipe_kwargs": {name: identity(value) for name, value in pipe_kwargs.items()},
    }


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """Result of one prompt.

    It is `finished` once all candidates were sampled: a rerun skips it then. `output` has those so far; None without
    any. `error` is why it failed.
    """

    index: int
    prompt: str
    finished: bool
    error: str | None
    output: BestOfNOutput | None


class ResultsFolder:
    """Results of a `best_of_each`, read on demand; iterating gives those so far, in the prompts' order.

    The folder has settings.json, results.jsonl with one candidate per line, and for each prompt a record, the winners'
    images and, where a search changed them, their noises; the other candidates' images as `BestOfN(keep=)` wants it.
    It need not exist.
    """

    def __init__(self, path: str | Path, prompts: Sequence[str]) -> None:
        self.path, self.prompts = Path(path), list(prompts)
        number = "[0-9]" * 5 + "*"
        pictures = (f"{folder}/{number}_seed*.png" for folder in (_IMAGES, _SMALL))
        written = (f"{_PROMPTS}/{number}.json", *pictures, f"{_NOISES}/{number}.safetensors")
        contents = (_RESULTS, _PROMPTS, _IMAGES, _NOISES, _SMALL, *written)
        self._folder = RunFolder(path, argument="out", file="settings.json", contents=contents)
        self._lines: dict[int, str] = {}
        self.made_by: dict[str, Any] = {"call": {}}  # scheduler and arguments of the call, which images name
        self.small = True  # whether images other than the winners' are thumbnails

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[PromptResult]:
        return (result for index in range(len(self)) if (result := self.read(index)) is not None)

    @classmethod
    def open(cls, path: str | Path) -> ResultsFolder:
        """Open the folder of an earlier run, with that run's prompts."""
        settings = ResultsFolder(path, [])._settings()
        if settings is None:
            raise ValueError(f"path: expected a folder that best_of_each wrote, got {path}; it has no settings.json")
        return cls(path, settings["prompts"])

    def _settings(self) -> dict[str, Any] | None:
        settings = self._folder.settings()
        if settings is not None and not isinstance(settings.get("prompts"), list):
            raise ValueError(f"out: {self._folder.file} was not written by best_of_each; choose another folder")
        return settings

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder that no run wrote, or a run with other settings; write nothing."""
        if (before := self._settings()) is not None:
            other = _other_prompts(before["prompts"], self.prompts)
            self._folder.refuse([*differences(before, settings, ignore=("prompts",)), *other])

    def prepare(self, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Write the settings and remove records of unfinished prompts; with `overwrite`, all results."""
        if overwrite:
            self._settings()
        else:
            self.check(settings)
        self._folder.begin({**settings, "prompts": self.prompts}, overwrite=overwrite, ignore=("prompts",))
        for index in range(len(self)):
            if not self.finished(index):
                self.record_file(index).unlink(missing_ok=True)
        self.write_results()

    def write_results(self) -> None:
        """Write results.jsonl from the records."""
        for index in range(len(self)):
            if index not in self._lines and (record := self._record(index)) is not None:
                self._lines[index] = "".join(to_json(row) + "\n" for row in _rows(index, record))
        write_atomically(self.path / _RESULTS, "".join(self._lines[i] for i in sorted(self._lines)).encode())

    def write(self, index: int, output: BestOfNOutput | None, *, finished: bool, error: str | None = None) -> None:
        """Write the winners of a prompt and the other images, whole or small; then its record."""
        winners = zip(output.winners, output.seeds, output.images, strict=True) if output else ()
        images = {self.image_file(index, number): (image, seed) for number, seed, image in winners}
        others = output.others.items() if output else ()
        made = output is not None and None not in output.seeds  # whether candidates' numbers are seeds
        images |= {self.image_file(index, n, small=self.small): (image, n if made else None) for n, image in others}
        for file, (image, seed) in images.items():
            write_atomically(file, png(image, self.prompts[index], seed=seed, **self.made_by))
        if output is not None and output.noises is not None:
            noises = zip(output.winners, output.noises, strict=True)
            write_atomically(self._noises(index), save({str(seed): noise.contiguous() for seed, noise in noises}))
        record = {
            "prompt": self.prompts[index],
            "finished": finished,
            "error": error,
            "denoiser_calls": output and output.denoiser_calls,
            "seeds": output.seeds if output else [],
            "candidates": list(self._candidates(index, output)) if output else [],
            "previews": {s: [asdict(p) for p in ps] for s, ps in output.previews.items()} if output else {},
        }
        write_atomically(self.record_file(index), to_json(record).encode())
        for folder in (_IMAGES, _SMALL):
            for stale in set((self.path / folder).glob(f"{index:05d}_seed*.png")) - set(images):
                stale.unlink()

    def read(self, index: int) -> PromptResult | None:
        """Return the result of a prompt; None if it was not reached, or its files are damaged."""
        record = self._record(index)
        if record is None:
            return None
        try:
            output = self._output(index, record) if record["candidates"] else None
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError):  # an image or a noise is damaged
            return None
        known = {name: record[name] for name in ("prompt", "finished", "error")}
        return PromptResult(index=index, output=output, **known)

    def reached(self, index: int) -> bool:
        """Return whether a prompt has a record."""
        return self.record_file(index).is_file()

    def finished(self, index: int) -> bool:
        """Return whether all of a prompt's candidates were sampled and its winners are there."""
        record = self._record(index)
        if record is None or not record["finished"]:
            return False
        winners = [row["seed"] for row in record["candidates"] if row["rank"] is not None]
        return all(self.image_file(index, seed).is_file() for seed in winners)

    def failures(self) -> dict[int, str]:
        """Return why prompts failed, by number."""
        records = ((index, self._record(index)) for index in range(len(self)))
        return {index: record["error"] for index, record in records if record is not None and record["error"]}

    def record_file(self, index: int) -> Path:
        """Return the file of a prompt's record, which is written after its other files."""
        return self.path / _PROMPTS / f"{index:05d}.json"

    def image_file(self, index: int, seed: int, *, small: bool = False) -> Path:
        """Return the file of a candidate's image, or of its small copy."""
        return self.path / (_SMALL if small else _IMAGES) / f"{index:05d}_seed{seed}.png"

    def _noises(self, index: int) -> Path:
        return self.path / _NOISES / f"{index:05d}.safetensors"

    def _record(self, index: int) -> dict[str, Any] | None:
        """Read a record; None without one, or if it is damaged or of another prompt."""
        try:
            record = read_json(self.record_file(index))
            return record if record["prompt"] == self.prompts[index] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _candidates(self, index: int, output: BestOfNOutput) -> Iterator[dict[str, Any]]:
        places = {seed: rank for rank, seed in enumerate(output.winners, start=1)}
        for seed, total, quality, correspondence in output.all_rows():
            error = output.dropped.get(seed)
            kept = seed in places or (not self.small and seed in output.others)
            image = f"{_IMAGES}/{self.image_file(index, seed).name}" if kept else None
            scores = {"total": total, "quality": quality, "correspondence": correspondence, "error": error}
            place = {"prompt_index": index, "rank": places.get(seed), "image": image}
            pruned = error is None and math.isnan(total)
            yield {"seed": seed, "prompt": self.prompts[index], **scores, **place, "pruned": pruned}

    def _others(self, index: int, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Image.Image]]:
        """Yield the images of candidates that are not among the best, as far as they were kept."""
        for seed in (row["seed"] for row in rows if row["rank"] is None):
            files = (self.image_file(index, seed, small=small) for small in (False, True))
            yield from ((seed, open_rgb(file)) for file in files if file.is_file())

    def _output(self, index: int, record: dict[str, Any]) -> BestOfNOutput:
        rows = record["candidates"]
        winners = sorted((row for row in rows if row["rank"] is not None), key=lambda row: row["rank"])
        noises = self._noises(index)
        by_seed = load(read_regular(noises, most=_NOISE_BYTES)) if noises.exists() else None

        def column(name: str, rows: Sequence[dict[str, Any]]) -> list[float]:
            return [math.nan if row[name] is None else row[name] for row in rows]

        def aspect(name: str, chosen: Sequence[dict[str, Any]]) -> list[float] | None:
            return None if all(row[name] is None for row in rows) else column(name, chosen)

        def preview(scores: dict[str, Any]) -> Preview:
            return Preview(**{**scores, "total": column("total", [scores])[0]})

        return BestOfNOutput(
            images=[open_rgb(self.image_file(index, row["seed"])) for row in winners],
            scores=column("total", winners),
            seeds=record["seeds"],
            winners=[row["seed"] for row in winners],
            quality=aspect("quality", winners),
            correspondence=aspect("correspondence", winners),
            all_scores=column("total", rows),
            all_seeds=[row["seed"] for row in rows],
            all_quality=aspect("quality", rows),
            all_correspondence=aspect("correspondence", rows),
            dropped={row["seed"]: row["error"] for row in rows if row["error"] is not None},
            previews={int(seed): tuple(map(preview, steps)) for seed, steps in record["previews"].items()},
            others=dict(self._others(index, rows)),
            denoiser_calls=record["denoiser_calls"],
            noises=None if by_seed is None else [by_seed[str(row["seed"])] for row in winners],
        )


def _other_prompts(earlier: Sequence[str], prompts: Sequence[str]) -> Iterator[str]:
    """Yield one phrase per difference between two lists of prompts; more prompts at the end are none."""
    if len(prompts) < len(earlier):
        yield f"prompts: {len(earlier)} there, {len(prompts)} now; more may be added at the end, none left out"
    changed = [place for place, (a, b) in enumerate(zip(earlier, prompts, strict=False)) if a != b]
    for place in changed[:_LISTED]:
        yield f"prompt {place}: {earlier[place]!r:.80} there, {prompts[place]!r:.80} now"
    if len(changed) > _LISTED:
        yield f"{len(changed) - _LISTED} more prompts"


def _rows(index: int, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of results.jsonl of a prompt: its candidates and, if it failed, why."""
    rows = list(record["candidates"])
    if record["error"]:
        scores = dict.fromkeys(("total", "quality", "correspondence"))
        place = {"prompt_index": index, "rank": None, "image": None, "pruned": False}
        rows.append({"seed": None, "prompt": record["prompt"], **scores, "error": record["error"], **place})
    return [{**row, "finished": record["finished"]} for row in rows]


class BestOfEachError(RuntimeError):
    """Some prompts failed: `failures` has why, by the prompt's number; the others are in the folder `results`."""

    def __init__(self, failures: Mapping[int, str], results: ResultsFolder) -> None:
        named = [f"prompt {i} ({results.prompts[i][:80]!r}): {why}" for i, why in failures.items()]
        more = f"; and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
        super().__init__(
            f"{len(named)} of {len(results)} prompts failed: {'; '.join(named[:_LISTED])}{more}. "
            f"The others are in {results.path}; the same call tries the failed ones again"
        )
        self.failures, self.results = dict(failures), results


def best_of_each(
    search: BestOfN,
    prompts: Sequence[str],
    out: str | Path,
    *,
    seed: int = 0,
    accelerator: Accelerator | PartialState | None = None,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: bool | Callable[[int, int], object] = True,
    **pipe_kwargs: Any,
) -> ResultsFolder:
    """Run a BestOfN for each prompt and write the results into a folder (see `ResultsFolder`).

    The same call again skips finished prompts; more prompts may then have been added at the end. A prompt that fails
    is recorded, and the run continues with the others; an interrupted one is sampled again.

    Every prompt starts at the same `seed`: its result is that of `search(prompt, seed=seed, **pipe_kwargs)`. Under
    torchrun or `accelerate launch`, whose processes must share the folder, process i of N takes the prompts i, i + N,
    ...; each process returns when all prompts are done.

    Args:
        search: BestOfN to run; only its `batch_size` and `progress` may differ between runs into one folder.
        prompts: prompts, not blank.
        out: folder; it need not exist.
        seed: seed of the first candidate of every prompt.
        accelerator: accelerate's Accelerator or PartialState; by default one is made if there are several processes.
            The pipeline and the reward stay where they are: put them on the process's device.
        overwrite: whether to remove the results of an earlier run in this folder and start again.
        settings: whatever else decides the results, as JSON (see `describe`).
        progress: whether to show a bar in the main process; or a function f(done, total) to call there.
        **pipe_kwargs: arguments of the pipeline's call, as for `search`.

    Raises:
        BestOfEachError: some prompts failed; after the last prompt.
    """
    results = ResultsFolder(out, checked_prompts(prompts))
    _check_names(search.pipe, pipe_kwargs)
    described = describe(search, seed, settings or {}, pipe_kwargs)
    if not overwrite:
        results.check(described)
    with suppress(PromptError):  # which is recorded when its turn comes
        search.stream(results.prompts[0], seed, **pipe_kwargs).close()  # checks the arguments
    processes = accelerator or _processes(search.pipe)
    if processes.is_main_process:
        results.prepare(described, overwrite=overwrite)
    processes.wait_for_everyone()  # only here: the shares may take hours, and collectives time out
    pending = [index for index in range(len(results)) if not results.finished(index)]
    mine = [index for index in pending if index % processes.num_processes == processes.process_index]
    results.made_by = {"scheduler": getattr(search.pipe, "scheduler", None), "call": pipe_kwargs}
    results.small = search.keep != "all"
    run = _Run(search, results, seed, pipe_kwargs, progress, leads=processes.is_main_process)
    run.do(mine, pending)
    if failures := results.failures():
        raise BestOfEachError(failures, results) from run.first
    return results


@dataclass
class _Run:
    """The work of one process; `first` is the first error that one of its prompts failed with."""

    search: BestOfN
    results: ResultsFolder
    seed: int
    pipe_kwargs: dict[str, Any]
    progress: bool | Callable[[int, int], object]
    leads: bool
    first: Exception | None = None

    def do(self, mine: Sequence[int], pending: Sequence[int]) -> None:
        """Sample this process's prompts, and wait for the others'."""
        try:
            self._work(mine)
            waiting = [index for index in pending if not self.results.reached(index)]
            while waiting:
                time.sleep(_PAUSE)
                left = [index for index in waiting if not self.results.reached(index)]
                if self.leads and len(left) < len(waiting):
                    self.results.write_results()
                waiting = left
        except KeyboardInterrupt as error:
            done = sum(self.results.finished(index) for index in range(len(self.results)))
            of = f"{done} of {len(self.results)} prompts are finished in {self.results.path}"
            error.add_note(f"{of}; the same call resumes there")
            raise
        finally:
            if self.leads:
                self.results.write_results()

    def _work(self, indices: Sequence[int]) -> None:
        n, total = self.search.n, self.search.n * len(indices)
        with tqdm(total=total, desc="best of n", disable=not (self.progress is True and self.leads and total)) as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)
                if callable(self.progress) and self.leads:
                    self.progress(done, total)

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
            text = " ".join(part for part in (str(error), *getattr(error, "__notes__", [])) if part)
            reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
            self.results.write(index, output, finished=False, error=reason)
        else:
            self.results.write(index, output, finished=True)


def _processes(pipe: Any) -> Any:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        alone = {"process_index": 0, "num_processes": 1, "is_main_process": True}
        return SimpleNamespace(**alone, wait_for_everyone=lambda: None)
    from accelerate import PartialState

    device = getattr(pipe, "device", None)
    return PartialState(cpu=device is None or device.type == "cpu")


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts as a list; refuse a single text, an empty list and blank prompts."""
    if isinstance(prompts, str):
        raise TypeError("prompts: expected several texts, got one; pass a list, [prompt]")
    texts = [check_text(text, f"prompts[{place}]", "leave blank ones out") for place, text in enumerate(prompts)]
    if not texts:
        raise ValueError("prompts: expected at least one text, got none")
    return texts


def _check_names(pipe: Any, pipe_kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline does not have, rather than fail for each prompt."""
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

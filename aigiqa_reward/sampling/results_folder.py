"""A folder that holds the best of N for many prompts: written prompt by prompt, read again one at a time.

    settings.json          what the run was asked for; another run does not go on from it
    prompts/00000.json     all of a prompt's candidates, written when the prompt is finished
    images/00000_seed7.png its winners
    noises/00000.safetensors  the winners' initial latents, where their seeds alone do not make them again
    results.jsonl          the candidates of all prompts, one a line, put together from the above; `finished` is false
                           where a prompt's were not all sampled, so that its ranks are those among the ones reached

Names come from numbers, never from a prompt's text.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from aigiqa_reward.images.loading import open_rgb
from aigiqa_reward.reading import read_json, read_regular
from aigiqa_reward.sampling._records import finite, is_record, preview_of
from aigiqa_reward.sampling.candidates import BestOfNOutput
from aigiqa_reward.sampling.run_settings import differences
from aigiqa_reward.weights import write_atomically

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
        differing = list(differences(note["settings"], settings, note["prompts"], self.prompts))
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

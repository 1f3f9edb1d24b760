"""Preference pairs for Diffusion-DPO: made with a reward, or chosen by people.

Both are `datasets.PreferencePairs`, prompts and the files of a better and a worse image each, so that training cannot
tell them apart. A folder of ours holds

    settings.json, prompts/, images/, results.jsonl   best of N for each prompt, as `sampling.best_of_each` writes it;
                                                      where candidates differ in guidance, a folder of each kind
    pairs.parquet                                     one pair a row: `COLUMNS`
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aigiqa_reward.datasets import PreferencePairs, read_pickapic
from aigiqa_reward.datasets._rows import extra_data
from aigiqa_reward.finetuning.pair_candidates import Contrast, sampled
from aigiqa_reward.reading import read_json
from aigiqa_reward.sampling.best_of_n import BestOfN
from aigiqa_reward.sampling.checks import number
from aigiqa_reward.sampling.many_prompts import ResultsFolder, checked_prompts
from aigiqa_reward.selection import integer
from aigiqa_reward.weights import write_atomically

FILE = "pairs.parquet"
"""Name of the table in a folder of pairs."""

COLUMNS = ("prompt", "winner", "loser", "winner_reward", "loser_reward", "prompt_index")
"""Of the table. Files are named relative to its folder; only the first three are needed to read it."""

_NEEDED = COLUMNS[:3]
_OF_PICKAPIC = ("caption", "jpg_0", "jpg_1")
_LISTED = 3


def build_preference_pairs(
    pipe: Any,
    reward: Any,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    n: int = 4,
    margin: float = 0.0,
    pairs_per_prompt: int = 1,
    guidance_scales: Sequence[float] = (),
    reward_guidance: float = 0.0,
    seed: int = 0,
    batch_size: int = 4,
    accelerator: Any = None,
    settings: Mapping[str, Any] | None = None,
    progress: Any = True,
    **pipe_kwargs: Any,
) -> PreferencePairs:
    """Pair the best with the worst of N images a prompt, sampled by `best_of_each`: called again it goes on.

    Args:
        pipe: a text-to-image pipeline of diffusers.
        reward: a Reward or any RewardFunction.
        prompts: texts, not blank.
        folder: created where it does not exist.
        n: candidates for each prompt, at least 2.
        margin: difference of rewards that a pair must exceed, at least 0, in the reward's units; ties never pair.
        pairs_per_prompt: best with worst, second best with second worst, and so on; at most n / 2. With
            `guidance_scales` or `reward_guidance`: of how many noises; at most n.
        guidance_scales: at least two, at which each noise is sampled, and its best image paired with its worst: they
            differ in what guidance does, as Pick-a-Pic's do (Kirstain et al. 2023, section 2).
        reward_guidance: above 0, each noise is sampled once more with `sampling.RewardGuidance` of this scale, and
            paired with itself: they differ in what the reward likes, far more than noises do. Needs its gradient.
        seed: of the first candidate of every prompt.
        batch_size: candidates sampled at once.
        accelerator: as for `best_of_each`.
        settings: likewise; what else decides the images (a LoRA, say), as JSON.
        progress: likewise.
        **pipe_kwargs: for the pipeline (steps, guidance, size, ...).

    Raises:
        ImportError: the extra `data` is not installed.
        TypeError, ValueError: an unusable argument, a folder of other settings, or no pair above the margin.
        BestOfEachError: some prompts failed; the pairs of the others are written.
    """
    extra_data("pyarrow.parquet", f"writing {FILE}")
    contrast = Contrast(guidance_scales=guidance_scales, reward_guidance=reward_guidance)
    prompts = checked_prompts(prompts)
    count = contrast.check_count(pairs_per_prompt, integer("n", n, least=2), "n")
    margin = number("margin", margin, "of at least 0, a difference of rewards", lambda value: 0 <= value < math.inf)
    search = BestOfN(pipe, reward, n=n, top_k=n, batch_size=batch_size, progress=False)
    pipe_kwargs |= {"seed": seed, "accelerator": accelerator, "settings": settings}
    results, failed = sampled(search, prompts, Path(folder), contrast, progress, pipe_kwargs)
    rows = list(_contrasted(results, count, margin) if contrast else _paired(results[0], count, margin))
    _write(Path(folder), rows)  # by every process: the same bytes, whole or not at all
    if failed is not None:
        raise failed
    if not rows:
        raise _too_alike(results, Path(folder), margin)
    return _as_pairs(rows, Path(folder))


def read_preference_pairs(path: str | os.PathLike[str]) -> PreferencePairs:
    """Read pairs: a folder or table of `build_preference_pairs`, or Pick-a-Pic's in its published layout.

    Args:
        path: a folder that holds `pairs.parquet`, or other parquet files, which are then read by `read_pickapic`; or
            one parquet file, of which the columns tell whose it is.

    Raises:
        ImportError: the extra `data` is not installed.
        ValueError: no such file, a missing column, no row, or images that are not there.
    """
    source = Path(path)
    file = source / FILE if source.is_dir() else source
    if source.is_dir() and not file.is_file() and any(source.glob("*.parquet")):
        return read_pickapic(source)
    if not file.is_file():
        raise ValueError(
            f"pairs: no file {file}; expected a folder with {FILE}, or a parquet file: make one with "
            "build_preference_pairs"
        )
    parquet = extra_data("pyarrow.parquet", f"reading {file.name}")
    try:
        names = parquet.read_schema(file).names
    except Exception as error:  # pyarrow has many kinds for what is damaged
        raise ValueError(f"pairs: {file} is not a parquet file ({error}); make it anew") from error
    if missing := [name for name in _NEEDED if name not in names]:
        if all(name in names for name in _OF_PICKAPIC):
            return read_pickapic(file)
        raise ValueError(
            f"pairs: {file} has no column {', '.join(missing)}; expected {', '.join(_NEEDED)}, or Pick-a-Pic's "
            f"{', '.join(_OF_PICKAPIC)}; got {', '.join(names)}"
        )
    try:
        rows = parquet.read_table(file, columns=list(_NEEDED)).to_pylist()
    except Exception as error:  # pyarrow has many kinds for pages that are damaged
        raise ValueError(f"pairs: {file} is damaged ({error}); make it anew") from error
    if not rows:
        raise ValueError(f"pairs: {file} holds no pair: lower the margin that it was made with, or raise n")
    for place, row in enumerate(rows):
        if wrong := [name for name in _NEEDED if not (isinstance(row[name], str) and row[name].strip())]:
            raise ValueError(f"pairs: {file}, row {place} (the first is 0): expected a text in {', '.join(wrong)}")
    pairs = _as_pairs(rows, file.parent)
    absent = [image for image in (*pairs.better, *pairs.worse) if not image.is_file()]
    if absent:
        named = ", ".join(str(image) for image in absent[:_LISTED])
        raise ValueError(
            f"pairs: {len(absent)} of the {2 * len(pairs)} images that {file} names are not there (first: {named}); "
            "put them back, or make the pairs anew"
        )
    return pairs


def fingerprint(pairs: PreferencePairs) -> str:
    """What tells these pairs from others, to note with a training: prompts and names of files, not where they lie."""
    above = Path(os.path.commonpath([image.parent for image in (*pairs.better, *pairs.worse)]))
    rows = zip(pairs.prompts, pairs.better, pairs.worse, strict=True)
    named = ((prompt, *(image.relative_to(above).as_posix() for image in images)) for prompt, *images in rows)
    text = "\n".join("\t".join(row) for row in named)
    return f"{len(pairs)} pairs {hashlib.sha256(text.encode()).hexdigest()[:16]}"


# --------------------------------------------------------------------------------------------- parts


def _paired(results: ResultsFolder, count: int, margin: float) -> Iterator[dict[str, Any]]:
    """Rows of the table: the best with the worst of each finished prompt, from the outside in."""
    for index, prompt in enumerate(results.prompts):
        ranked = _ranked(results, index)
        for better, worse in list(zip(ranked, reversed(ranked), strict=True))[: min(count, len(ranked) // 2)]:
            if better["total"] - worse["total"] > margin:
                yield _row(prompt, index, better, worse, results.path)


def _contrasted(results: Sequence[ResultsFolder], count: int, margin: float) -> Iterator[dict[str, Any]]:
    """Rows of the table: of a prompt's noises with the greatest differences, the best with the worst image."""
    for index, prompt in enumerate(results[0].prompts):
        pairs = list(_of_one_noise(results, index))
        pairs.sort(key=lambda pair: pair[1]["total"] - pair[0]["total"])  # stable: the earlier seed first
        for better, worse in pairs[:count]:
            if better["total"] - worse["total"] > margin:
                yield _row(prompt, index, better, worse, results[0].path.parent)


def _of_one_noise(results: Sequence[ResultsFolder], index: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Best and worst image of each seed, where there are two."""
    seeds: dict[int, list[dict[str, Any]]] = {}
    for folder in results:
        for row in _ranked(folder, index):
            seeds.setdefault(row["seed"], []).append(row)
    for _, rows in sorted(seeds.items()):
        if len(rows) > 1:
            ranked = sorted(rows, key=lambda row: -row["total"])
            yield ranked[0], ranked[-1]


def _row(prompt: str, index: int, better: Mapping[str, Any], worse: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row of the table, with images named from its folder."""
    return {
        "prompt": prompt,
        "winner": better["image"].relative_to(folder).as_posix(),
        "loser": worse["image"].relative_to(folder).as_posix(),
        "winner_reward": better["total"],
        "loser_reward": worse["total"],
        "prompt_index": index,
    }


def _ranked(results: ResultsFolder, index: int) -> list[dict[str, Any]]:
    """A finished prompt's candidates, best first, as its record has them: the images themselves are not opened."""
    if not results.finished(index):
        return []
    rows = read_json(results.record_file(index))["candidates"]
    known = [row for row in rows if row["rank"] is not None and row["total"] is not None]
    named = [{**row, "image": results.image_file(index, row["seed"])} for row in known]
    return sorted(named, key=lambda row: row["rank"])


def _too_alike(results: Sequence[ResultsFolder], folder: Path, margin: float) -> ValueError:
    return ValueError(
        f"margin: no prompt has two images whose rewards differ by more than {margin}; the greatest difference in "
        f"{folder} is {max(_greatest(results)):.4g}: lower margin, or raise n"
    )


def _greatest(results: Sequence[ResultsFolder]) -> Iterator[float]:
    """The greatest difference between candidates of each prompt that can be paired."""
    for index in range(len(results[0])):
        if len(results) > 1:
            yield max((a["total"] - b["total"] for a, b in _of_one_noise(results, index)), default=0.0)
        else:
            ranked = _ranked(results[0], index)
            yield ranked[0]["total"] - ranked[-1]["total"] if ranked else 0.0


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    pyarrow = extra_data("pyarrow", f"writing {FILE}")
    parquet = extra_data("pyarrow.parquet", f"writing {FILE}")
    types = {"reward": pyarrow.float64(), "index": pyarrow.int64()}
    schema = pyarrow.schema([(name, types.get(name.rpartition("_")[2], pyarrow.string())) for name in COLUMNS])
    data = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), data)
    write_atomically(folder / FILE, data.getvalue())


def _as_pairs(rows: Sequence[Mapping[str, Any]], folder: Path) -> PreferencePairs:
    return PreferencePairs(
        prompts=tuple(row["prompt"] for row in rows),
        better=tuple(folder / row["winner"] for row in rows),
        worse=tuple(folder / row["loser"] for row in rows),
    )

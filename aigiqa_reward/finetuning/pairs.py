"""Pairs of a pipeline's own images, made before a training by preference begins."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.datasets import PreferencePairs, read_pickapic
from aigiqa_reward.datasets.base import extra_data
from aigiqa_reward.finetuning.batch import seed_of
from aigiqa_reward.finetuning.checkpoints import checkpoints_in
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.sampling.batch_run import BestOfEachError, ResultsFolder, best_of_each, checked_prompts
from aigiqa_reward.sampling.best_of_n import BestOfN
from aigiqa_reward.sampling.families import Family
from aigiqa_reward.sampling.guidance import RewardGuidance
from aigiqa_reward.utils.checks import integer, number
from aigiqa_reward.utils.io import read_json, write_atomically

_CALLBACK = "callback_on_step_end"


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What the images of one noise differ in; by default there is one image of each, and noises are paired.

    Attributes:
        guidance_scales: none, or at least two different scales of guidance.
        reward_guidance: 0, or the scale of a `sampling.RewardGuidance`, with which each noise is sampled once more.

    Raises:
        ValueError: both, one scale alone or twice, or a number out of range.
    """

    guidance_scales: Sequence[float] = ()
    reward_guidance: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.guidance_scales, Sequence) or isinstance(self.guidance_scales, str):
            raise TypeError(f"guidance_scales: expected several numbers, as (1.0, 4.0), got {self.guidance_scales!r}")
        scales = tuple(number("guidance_scales", s, "in each place", math.isfinite) for s in self.guidance_scales)
        if len(scales) == 1 or len(set(scales)) < len(scales):
            raise ValueError(
                f"guidance_scales: expected none, or at least two different scales, got {list(self.guidance_scales)}"
            )
        expected = "of at least 0, a scale of RewardGuidance"
        number("reward_guidance", self.reward_guidance, expected, lambda value: 0 <= value < math.inf)
        if scales and self.reward_guidance:
            raise ValueError("guidance_scales, reward_guidance: images of one noise differ in one of them; pass one")
        object.__setattr__(self, "guidance_scales", scales)

    def __bool__(self) -> bool:
        return bool(self.guidance_scales or self.reward_guidance)

    def check_count(self, pairs_per_prompt: int, n: int, named: str) -> int:
        """The number of pairs of a prompt, of which `n` noises have one each, or two noises have one."""
        most, share = (n, named) if self else (n // 2, f"{named} / 2")
        if integer("pairs_per_prompt", pairs_per_prompt, least=1) > most:
            raise ValueError(
                f"pairs_per_prompt: expected at most {share} = {most}, got {pairs_per_prompt}; raise {named}"
            )
        return pairs_per_prompt


class GuidedBestOfN(BestOfN):
    """A BestOfN whose images climb its reward while they are sampled.

    Args:
        search: what it does otherwise.
        scale: of `sampling.RewardGuidance`.
        prompt: one of those to come, to try the reward with.

    Raises:
        TypeError, ValueError: a pipeline that RewardGuidance cannot guide, or a reward without gradients.
    """

    def __init__(self, search: BestOfN, scale: float, prompt: str) -> None:
        super().__init__(search.pipe, search.reward, n=search.n, top_k=search.top_k, batch_size=search.batch_size)
        self.progress, self.scale = search.progress, scale
        with RewardGuidance(self.pipe, self.reward, prompt, scale=scale):
            pass  # what is wrong with the pipeline is said here
        BoundReward(self.reward).check_differentiable("reward_guidance", prompt, self.pipe.device)

    def _sample(self, call: Any, seeds: Sequence[int]) -> tuple[Tensor, list[Any]]:
        with RewardGuidance(self.pipe, self.reward, call.prompt, scale=self.scale) as guidance:
            return super()._sample(replace(call, pipe_kwargs={**call.pipe_kwargs, _CALLBACK: guidance}), seeds)


def sampled(
    search: BestOfN, prompts: Sequence[str], folder: Path, contrast: Contrast, progress: Any, more: dict[str, Any]
) -> tuple[list[ResultsFolder], BestOfEachError | None]:
    """All candidates of all prompts, and the first failure.

    Args:
        search: ranks all of a prompt's candidates.
        prompts: texts.
        folder: holds the results; where there is a contrast, in a folder of each kind of images.
        contrast: what the kinds differ in.
        progress: as of `best_of_each`, over all kinds.
        more: further arguments of `best_of_each`.
    """
    failed, results = None, []
    for place, (name, of_kind, own) in enumerate(kinds := _kinds(search, prompts, contrast, more)):
        show = _part_of(progress, place, len(kinds))
        try:
            results.append(best_of_each(of_kind, prompts, folder / name, progress=show, **{**more, **own}))
        except BestOfEachError as error:
            results.append(error.results)
            failed = failed or error
    return results, failed


def _kinds(
    search: BestOfN, prompts: Sequence[str], contrast: Contrast, more: dict[str, Any]
) -> list[tuple[str, BestOfN, dict[str, Any]]]:
    """Of images of one noise: a folder's name, what samples them, and arguments of its own."""
    if scale := contrast.reward_guidance:
        if _CALLBACK in more:
            raise ValueError(f"{_CALLBACK}: reward_guidance is one itself; leave out one of the two")
        noted = {"settings": {**(more.get("settings") or {}), "reward_guidance": scale}}
        guided = GuidedBestOfN(search, scale, prompts[0])
        return [("unguided", search, {}), (f"reward-guidance-{scale:g}", guided, noted)]
    if contrast.guidance_scales:
        return [(f"guidance-{scale:g}", search, {"guidance_scale": scale}) for scale in contrast.guidance_scales]
    return [("", search, {})]


def _part_of(progress: Any, place: int, parts: int) -> Any:
    """A caller's bar over several runs: of run `place` what is done of all of them."""
    if not callable(progress) or parts < 2:
        return progress
    return lambda done, total: progress(place * total + done, parts * total)


REMEMBERED = 2 * 2**30
"""Bytes of latents to remember: chosen here; 16,000 pairs of Stable Diffusion's at 512 px, 4,000 at 1024 px."""


class PairLatents:
    """Latents of both images of a pair, for one pipeline at a time.

    Args:
        pairs: whose images are read.
        remembered: bytes of latents to keep in the CPU's memory; the pair unused for longest goes first.

    Raises:
        TypeError: other pairs, as the path of a folder.
        ValueError: none.
    """

    def __init__(self, pairs: PreferencePairs, *, remembered: int = REMEMBERED) -> None:
        if not isinstance(pairs, PreferencePairs):
            raise TypeError(f"pairs: expected PreferencePairs, got {pairs!r}; pass read_preference_pairs(folder)")
        if not len(pairs):
            raise ValueError("pairs: expected at least one, got none")
        self.pairs = pairs
        self.remembered = remembered
        self._family: Family | None = None
        self._known: OrderedDict[int, Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, family: Family, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, ...) of the better and of the worse images of these pairs, on the CPU, in at least float32.

        Raises:
            ImageError: an image that cannot be read.
        """
        if family is not self._family:
            self._family, self._bytes = family, 0
            self._known.clear()
        rows = torch.stack([self._latents(family, place) for place in places])
        return rows[:, 0], rows[:, 1]

    def _latents(self, family: Family, place: int) -> Tensor:
        """(2, ...) of one pair."""
        if place in self._known:
            self._known.move_to_end(place)
            return self._known[place]
        files = (self.pairs.better[place], self.pairs.worse[place])
        images = torch.cat([fitted(pixels.load(file)[None], family.size()) for file in files])
        with torch.no_grad(), torch.autocast(family.device.type, enabled=False):
            latents = family.encode_images(images.to(family.device)).cpu()
        self._known[place] = latents
        self._bytes += latents.nbytes
        while self._bytes > self.remembered and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1].nbytes
        return latents


def fitted(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] scaled to cover `size` = (height, width), the same from all sides cut off."""
    height, width = images.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    covering = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    images = pixels.resize(images, covering).clamp(0, 1)  # bicubic overshoots
    top, left = math.floor((covering[0] - size[0]) / 2), math.floor((covering[1] - size[1]) / 2)
    return images[:, :, top : top + size[0], left : left + size[1]]


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


def own_pairs(
    tools: TrainingContext,
    prompts: Sequence[str],
    folder: Path,
    settings: FinetuneConfig,
    *,
    progress: bool,
    **how: Any,
) -> PreferencePairs:
    """Pairs of the pipeline's images, made into `folder`/pairs or found there.

    Args:
        tools: of the training.
        prompts: of which each has images.
        folder: of the training.
        settings: of the training; its seed gives other images than those of validation, whose seeds count from 0.
        progress: show a bar.
        **how: further arguments of `build_preference_pairs`.

    Warns:
        UserWarning: some prompts could not be sampled or ranked, or some pairs differ by the margin or less; they are
            missing.

    Raises:
        ValueError: checkpoints of a training on pairs of other prompts, or no pair above the margin.
        BestOfEachError: no prompt gave a pair.
    """
    made = folder / "pairs"
    if checkpoints_in(folder):
        _check_prompts(made, prompts)
    try:
        pairs = build_preference_pairs(
            tools.rollout.pipe,
            tools.reward,
            prompts,
            made,
            seed=seed_of(settings.seed, "pairs") >> 32,
            batch_size=settings.train_batch_size,
            accelerator=tools.accelerator,
            progress=progress,
            **how,
            **settings.sampling,
        )
    except ValueError as error:
        if str(error).startswith("out: "):  # as a folder of other settings
            error.add_note(f"n and top_k are DPO's candidates; to make the pairs anew, remove {made}")
        raise
    except BestOfEachError as error:
        try:
            pairs = read_preference_pairs(made)
        except ValueError:
            raise error from None  # there is none
        warnings.warn(f"{error}. Training takes the {len(pairs)} pairs of the others, in {made / FILE}", stacklevel=2)
        return pairs
    wanted = len(prompts) * how["pairs_per_prompt"]
    if len(pairs) < wanted and tools.accelerator.is_main_process:
        text = f"pairs: {len(pairs)} of {wanted} have rewards that differ by more than margin={how['margin']:g}"
        warnings.warn(f"{text}; training takes these, in {made / FILE}", stacklevel=2)
    return pairs


def _check_prompts(made: Path, prompts: Sequence[str]) -> None:
    """Refuse to extend what a checkpoint was trained on, which then could not go on as it was."""
    for note in (made / "settings.json", *sorted(made.glob("*/settings.json"))):
        if note.is_file() and (before := read_json(note)["prompts"]) != list(prompts):
            raise ValueError(
                f"prompts: {made} has the pairs of {len(before)} prompts that the checkpoints beside it are "
                f"trained on, and {len(prompts)} others are given; pass the same, or another output_dir"
            )

"""Preference pairs of a pipeline's own images: sampled, compared by a reward, kept in a table, and read again."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.datasets import PreferencePairs, read_preference_pairs
from aigiqa_reward.datasets.base import extra_data
from aigiqa_reward.datasets.pairs import PAIRS_COLUMNS, PAIRS_FILE, named_pairs, write_pairs_table
from aigiqa_reward.finetuning.batch import seed_of
from aigiqa_reward.finetuning.checkpoints import checkpoints_in
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.sharding import is_sharded
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.sampling.batch_run import BestOfEachError, ResultsFolder, best_of_each, checked_prompts
from aigiqa_reward.sampling.best_of_n import BestOfN, BestOfNOutput
from aigiqa_reward.sampling.families import Family
from aigiqa_reward.sampling.guidance import RewardGuidance
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.checks import integer, number
from aigiqa_reward.utils.io import read_json

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from aigiqa_reward.finetuning.context import TrainingContext

COLUMNS = (*PAIRS_COLUMNS, "winner_reward", "loser_reward", "prompt_index")
"""Columns of the table that `build_preference_pairs` writes."""

CACHE_BYTES = 2 * 2**30
"""Bytes of latents to keep: 16,000 pairs of Stable Diffusion at 512 px, 4,000 at 1024 px."""

_CALLBACK = "callback_on_step_end"

_Pair = tuple[dict[str, Any], dict[str, Any]]
"""Records of the better and of the worse image."""


def check_pairing(
    guidance_scales: Sequence[float], reward_guidance: float, pairs_per_prompt: int, n: int, named: str
) -> tuple[float, ...]:
    """Check how images are paired, see `build_preference_pairs`, and return the guidance scales; `named` sets n."""
    if not isinstance(guidance_scales, Sequence) or isinstance(guidance_scales, str):
        raise TypeError(f"guidance_scales: expected several numbers, as (1.0, 4.0), got {guidance_scales!r}")
    scales = tuple(number("guidance_scales", s, "in each place", math.isfinite) for s in guidance_scales)
    if len(scales) == 1 or len(set(scales)) < len(scales):
        raise ValueError(f"guidance_scales: expected at least two different scales or none, got {list(scales)}")
    expected = "of at least 0, a scale of RewardGuidance"
    number("reward_guidance", reward_guidance, expected, lambda value: 0 <= value < math.inf)
    if scales and reward_guidance:
        raise ValueError("guidance_scales, reward_guidance: images of one noise differ in one of them; pass one")
    most, share = (n, named) if scales or reward_guidance else (n // 2, f"{named} / 2")
    if integer("pairs_per_prompt", pairs_per_prompt, least=1) > most:
        raise ValueError(f"pairs_per_prompt: expected at most {share} = {most}, got {pairs_per_prompt}; raise {named}")
    return scales


class GuidedBestOfN(BestOfN):
    """A copy of a BestOfN that samples with `RewardGuidance` of a scale; a prompt checks pipeline and reward."""

    def __init__(self, search: BestOfN, scale: float, prompt: str) -> None:
        super().__init__(search.pipe, search.reward, n=search.n, top_k=search.top_k, batch_size=search.batch_size)
        self.progress, self.scale = search.progress, scale
        with RewardGuidance(self.pipe, self.reward, prompt, scale=scale):
            pass  # refuses a pipeline that cannot be guided
        BoundReward(self.reward).check_differentiable("reward_guidance", prompt, self.pipe.device)

    def _start(
        self, prompt: str | None, seed: int, pipe_kwargs: dict[str, Any], *, stacklevel: int
    ) -> Generator[BestOfNOutput, None, None]:
        with RewardGuidance(self.pipe, self.reward, prompt or "", scale=self.scale) as guidance:
            yield from super()._start(prompt, seed, {**pipe_kwargs, _CALLBACK: guidance}, stacklevel=stacklevel + 1)


def build_preference_pairs(
    pipe: DiffusionPipeline,
    reward: RewardFunction | str,
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
    accelerator: Accelerator | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | Callable[[int, int], object] = True,
    **pipe_kwargs: Any,
) -> PreferencePairs:
    """Pair the best with the worst of n images per prompt, sampled by `best_of_each`; the same call again resumes.

    Args:
        pipe: Text-to-image pipeline of diffusers.
        reward: Reward, its name, or RewardFunction that compares the images.
        prompts: Texts, not blank.
        folder: Output folder.
        n: Candidates per prompt, at least 2.
        margin: Difference of rewards that a pair must exceed; ties are never paired.
        pairs_per_prompt: Pairs per prompt: best with worst, second best with second worst, and so on, at most n / 2.
            With `guidance_scales` or `reward_guidance` the noises with the greatest differences, at most n.
        guidance_scales: At least two scales at which each noise is sampled, to pair its best image with its worst:
            they differ in what guidance does, as Pick-a-Pic's do (Kirstain et al. 2023, section 2).
        reward_guidance: Scale above 0 of a `RewardGuidance` with which each noise is sampled once more, to pair both:
            they differ in the reward far more than noises do. Needs the reward's gradient.
        seed: Seed of the first candidate of every prompt.
        batch_size: Candidates sampled at once.
        accelerator: As for `best_of_each`.
        progress: As for `best_of_each`.
        settings: What else decides the images (a LoRA, say), as JSON.
        **pipe_kwargs: Arguments of the pipeline (steps, guidance, size, ...).
    """
    extra_data("pyarrow.parquet", f"writing {PAIRS_FILE}")
    folder, prompts = Path(folder), checked_prompts(prompts)
    margin = number("margin", margin, "of at least 0, a difference of rewards", lambda value: 0 <= value < math.inf)
    n = integer("n", n, least=2)
    scales = check_pairing(guidance_scales, reward_guidance, pairs_per_prompt, n, "n")
    search = BestOfN(pipe, reward, n=n, top_k=n, batch_size=batch_size, progress=False)
    pipe_kwargs |= {"seed": seed, "accelerator": accelerator, "settings": settings}
    kinds = list(_kinds(search, prompts, scales, reward_guidance, pipe_kwargs))
    results, failed = _sampled(kinds, prompts, folder, progress, pipe_kwargs)
    pairs = [_pairs(results, index)[:pairs_per_prompt] for index in range(len(prompts))]
    rows = [_row(prompts[i], i, pair, folder) for i, found in enumerate(pairs) for pair in found if _gap(pair) > margin]
    write_pairs_table(folder, rows, COLUMNS)  # by every process: the same bytes
    if failed is not None:
        raise failed
    if not rows:
        raise _nothing_paired(pairs, margin)
    return named_pairs(rows, folder)


def _nothing_paired(pairs: Sequence[Sequence[_Pair]], margin: float) -> ValueError:
    most = max((_gap(found[0]) for found in pairs if found), default=0.0)
    return ValueError(
        f"margin: no prompt has two images whose rewards differ by more than {margin}; the greatest difference is "
        f"{most:.4g}: lower margin, or raise n"
    )


def _kinds(
    search: BestOfN, prompts: Sequence[str], scales: Sequence[float], reward_guidance: float, more: Mapping[str, Any]
) -> Iterator[tuple[str, BestOfN, dict[str, Any]]]:
    """Yield for each kind of images its folder, what samples it, and its own arguments."""
    if reward_guidance:
        if _CALLBACK in more:
            raise ValueError(f"{_CALLBACK}: reward_guidance is one itself; leave out one of the two")
        settings = {"settings": {**(more.get("settings") or {}), "reward_guidance": reward_guidance}}
        yield "unguided", search, {}
        yield f"reward-guidance-{reward_guidance:g}", GuidedBestOfN(search, reward_guidance, prompts[0]), settings
    elif scales:
        yield from ((f"guidance-{scale:g}", search, {"guidance_scale": scale}) for scale in scales)
    else:
        yield "", search, {}


def _sampled(
    kinds: Sequence[tuple[str, BestOfN, dict[str, Any]]],
    prompts: Sequence[str],
    folder: Path,
    progress: bool | Callable[[int, int], object],
    arguments: Mapping[str, Any],
) -> tuple[list[ResultsFolder], BestOfEachError | None]:
    """Sample all kinds of images of all prompts; also return the first failure."""
    results, failed = [], None
    for place, (name, search, own) in enumerate(kinds):
        show = partial(_show_part, progress, place, len(kinds)) if callable(progress) else progress
        try:
            results.append(best_of_each(search, prompts, folder / name, progress=show, **{**arguments, **own}))
        except BestOfEachError as error:
            results.append(error.results)
            failed = failed or error
    return results, failed


def _show_part(progress: Callable[[int, int], object], place: int, parts: int, done: int, total: int) -> None:
    """Show the progress of run `place` of several as that of all."""
    progress(place * total + done, parts * total)


def _pairs(results: Sequence[ResultsFolder], index: int) -> list[_Pair]:
    """All pairs of a prompt, widest first: of different noises, or with several kinds of images of the same noise."""
    ranked = [_ranked(folder, index) for folder in results]
    if len(results) == 1:
        return list(zip(ranked[0], reversed(ranked[0]), strict=True))[: len(ranked[0]) // 2]
    by_seed: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in chain(*ranked):
        by_seed[record["seed"]].append(record)
    rows = [sorted(by_seed[seed], key=lambda record: -record["total"]) for seed in sorted(by_seed)]
    return sorted(((row[0], row[-1]) for row in rows if len(row) > 1), key=lambda pair: -_gap(pair))


def _ranked(results: ResultsFolder, index: int) -> list[dict[str, Any]]:
    """Records of a finished prompt's candidates, best first; the images are not opened."""
    records = read_json(results.record_file(index))["candidates"] if results.finished(index) else []
    known = [record for record in records if record["rank"] is not None and record["total"] is not None]
    named = [{**record, "image": results.image_file(index, record["seed"])} for record in known]
    return sorted(named, key=lambda record: record["rank"])


def _gap(pair: _Pair) -> float:
    return pair[0]["total"] - pair[1]["total"]


def _row(prompt: str, index: int, pair: _Pair, folder: Path) -> dict[str, Any]:
    winner, loser = (record["image"].relative_to(folder).as_posix() for record in pair)
    return dict(zip(COLUMNS, (prompt, winner, loser, pair[0]["total"], pair[1]["total"], index), strict=True))


def fingerprint(pairs: PreferencePairs) -> str:
    """Return a text that identifies pairs by prompts and file names, wherever their folder is."""
    above = Path(os.path.commonpath([image.parent for image in (*pairs.better, *pairs.worse)]))
    rows = zip(pairs.prompts, pairs.better, pairs.worse, strict=True)
    named = ((prompt, *(image.relative_to(above).as_posix() for image in images)) for prompt, *images in rows)
    text = "\n".join("\t".join(row) for row in named)
    return f"{len(pairs)} pairs {hashlib.sha256(text.encode()).hexdigest()[:16]}"


class PairLatents:
    """Latents of both images of each pair, for one pipeline at a time; at most `most` bytes are kept in CPU memory."""

    def __init__(self, pairs: PreferencePairs, *, most: int = CACHE_BYTES) -> None:
        self.pairs, self.most = pairs, most
        self._family: Family | None = None
        self._known: dict[int, Tensor] = {}

    def __call__(self, family: Family, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the latents (B, ...) of the better and of the worse images, on the CPU, in at least float32."""
        if family is not self._family:
            self._family, self._known = family, {}
        rows = torch.stack([self._latents(family, place) for place in places])
        return rows[:, 0], rows[:, 1]

    def _latents(self, family: Family, place: int) -> Tensor:
        if place in self._known:
            return self._known[place]
        files = (self.pairs.better[place], self.pairs.worse[place])
        images = torch.cat([cover(pixels.load(file)[None], family.size()) for file in files])
        with torch.no_grad(), torch.autocast(family.device.type, enabled=False):
            latents = family.encode_images(images.to(family.device)).cpu()
        if (len(self._known) + 1) * latents.nbytes <= self.most:
            self._known[place] = latents
        return latents


def cover(images: torch.Tensor, size: tuple[int, int]) -> Tensor:
    """Scale images (B, 3, H, W) in [0, 1] to cover `size` = (height, width), and cut off both sides evenly."""
    height, width = images.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    covering = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    images = pixels.resize(images, covering).clamp(0, 1)  # bicubic overshoots
    top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return images[:, :, top : top + size[0], left : left + size[1]]


def own_pairs(
    context: TrainingContext, prompts: Sequence[str], folder: Path, config: FinetuneConfig, **arguments: Any
) -> PreferencePairs:
    """Make pairs of the pipeline's images in the `folder`/pairs of a training, or find them there.

    The seed of the training gives other images than those of validation.
    """
    made, accelerator = folder / "pairs", context.accelerator
    if is_sharded(context.lora.denoiser):
        raise ValueError(
            "fsdp: DPO samples its pairs with other numbers of images in each process, and a sharded denoiser needs "
            "equal ones; make them first (aigiqa-reward pairs), and pass their folder (--pairs)"
        )
    notes = (made / "settings.json", *sorted(made.glob("*/settings.json"))) if checkpoints_in(folder) else ()
    for note in notes:
        if note.is_file() and (before := read_json(note)["prompts"]) != list(prompts):
            raise ValueError(
                f"prompts: expected the {len(before)} prompts of the pairs in {made}, on which the checkpoints beside "
                f"it are trained, got {len(prompts)} others; pass the same, or another output_dir"
            )
    seed, size = seed_of(config.seed, "pairs") >> 32, config.train_batch_size
    more = {"seed": seed, "batch_size": size, "accelerator": accelerator, **arguments, **config.sampling}
    try:
        pairs = build_preference_pairs(context.rollout.pipe, context.reward, prompts, made, **more)
    except ValueError as error:
        error.add_note(f"n and top_k are DPO's candidates; to make the pairs again, remove {made}")
        raise
    except BestOfEachError as error:
        try:
            pairs = read_preference_pairs(made)
        except ValueError:
            raise error from None  # there is no pair
        warnings.warn(
            f"{error}. Training uses the {len(pairs)} pairs of the others, in {made / PAIRS_FILE}", stacklevel=2
        )
        return pairs
    wanted = len(prompts) * arguments["pairs_per_prompt"]
    if len(pairs) < wanted and accelerator.is_main_process:
        text = f"pairs: {len(pairs)} of {wanted} have rewards that differ by more than margin={arguments['margin']:g}"
        warnings.warn(f"{text}; training uses these, in {made / PAIRS_FILE}", stacklevel=2)
    return pairs

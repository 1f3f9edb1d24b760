"""What all sessions of the page share: folders, rewards, the pipeline, labels, and scores that are known already."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aigiqa_reward.images import ImageError, read_prompt
from aigiqa_reward.images.metadata import find_prompt, png
from aigiqa_reward.utils.io import write_atomically
from aigiqa_reward.web.labels import Labels, Pair, pair_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from aigiqa_reward.rewards.reward import Reward

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif")
"""Endings of images that browsers show."""

PROMPTS = ("the image, else the text", "the text", "auto", "embedded", "sidecar")
"""Where the prompts of images are: the first two take the text that is typed, the others are those of `read_prompt`."""

MOST_IMAGES, MOST_PAIRS = 2000, 2000
"""Images that are read from a folder, and pairs that are asked about per prompt."""

SAMPLED = "sampled on this page"
"""Name of the folder of samples."""

_BATCH = 4  # images between two signs of progress


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of one image, or why there are none."""

    path: str
    prompt: str
    total: float | None = None
    quality: float | None = None
    correspondence: float | None = None
    uncertainty: float = 1.0
    error: str | None = None
    raw_prompt: str | None = None


class Studio:
    """Folders that the page may show, and models that are loaded when they are first needed.

    Args:
        folders: folders of images and of results.
        output_dir: folder for labels, samples and taught rewards.
        rewards: further rewards by name, folder or Hub id; the first one is selected.
        load_reward: function that makes a reward from such a name.
        load_pipeline: function that makes the pipeline of the page.
        sampling: number of steps and guidance scale that the page starts with.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        output_dir: Path,
        *,
        rewards: Sequence[str] = ("compact",),
        load_reward: Callable[[str], Reward] | None = None,
        load_pipeline: Callable[[], DiffusionPipeline] | None = None,
        sampling: tuple[int, float] = (20, 3.0),
    ) -> None:
        from aigiqa_reward.rewards.factory import create_reward, get_reward_spec, list_rewards
        from aigiqa_reward.toy.pipeline import load_embedded_pipeline

        self.output_dir = output_dir.resolve()
        self.samples, self.taught, self.exported = (self.output_dir / n for n in ("samples", "rewards", "labels"))
        for folder in (self.samples, self.taught):
            folder.mkdir(parents=True, exist_ok=True)
        self.folders = {str(folder): folder.resolve() for folder in folders} | {SAMPLED: self.samples}
        self.labels = Labels(self.output_dir / "labels.sqlite3")
        self.sampling = sampling
        self._reward_lock, self._pipe_lock = threading.Lock(), threading.Lock()
        self._load_reward, self._load_pipeline = load_reward or create_reward, load_pipeline or load_embedded_pipeline
        self._names = [*rewards, *(name for name in list_rewards() if get_reward_spec(name).embedded)]
        self._rewards: dict[str, Reward] = {}
        self._pipe: DiffusionPipeline | None = None
        self._scores: dict[tuple[Any, ...], Score] = {}

    # ------------------------------------------------------------------------------------------ models

    @property
    def reward_names(self) -> list[str]:
        """Names of the rewards to choose from, those taught on this page included."""
        taught = sorted(file.parent.name for file in self.taught.glob("*/config.json"))
        return list(dict.fromkeys([*self._names, *(f"taught: {name}" for name in taught)]))

    def reward(self, name: str) -> Reward:
        """Return a reward of the list, loaded once."""
        from aigiqa_reward.rewards.reward import Reward

        if name not in self.reward_names:
            raise ValueError(f"reward: expected one of {', '.join(self.reward_names)}, got {name!r}")
        with self._reward_lock:
            if name not in self._rewards:
                folder = self.taught / name.removeprefix("taught: ")
                taught = folder.name != name
                self._rewards[name] = Reward.from_pretrained(folder) if taught else self._load_reward(name)
            return self._rewards[name]

    def pipe(self) -> DiffusionPipeline:
        """Return the pipeline, loaded once."""
        with self._pipe_lock:
            if self._pipe is None:
                self._pipe = self._load_pipeline()
            return self._pipe

    def warm_up(self) -> None:
        """Load the selected reward and the pipeline."""
        self.reward(self._names[0])
        self.pipe()

    # ------------------------------------------------------------------------------------------ images

    def images(self, folder: str, prompt: str = "") -> list[tuple[str, str]]:
        """Return path and prompt of the images of a named folder; `prompt` is of those without one."""
        found = (with_prompt(path, prompt) for path in self.files(folder))
        return [(each.path, each.prompt) for each in found]

    def files(self, folder: str) -> list[str]:
        """Return the paths of the images of a named folder."""
        if folder not in self.folders:
            raise ValueError(f"folder: expected one of {', '.join(self.folders)}, got {folder!r}")
        place = self.folders[folder]
        files = (file for file in sorted(place.rglob("*")) if file.suffix.lower() in IMAGES)
        inside = [file for file in files if file.resolve().is_relative_to(place) and file.is_file()]
        return [str(file) for file in inside[:MOST_IMAGES]]

    def score(self, name: str, images: Sequence[tuple[str, str]]) -> Iterator[list[Score]]:
        """Score images with their prompts, "" for none; yield the scores so far, first an empty list."""
        from aigiqa_reward.rewards.scorer import Scorer

        yield []
        reward, found = self.reward(name), []
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            for path, prompt in part:
                key = (name, path, os.stat(path).st_mtime_ns, prompt)  # noqa: PTH116
                if key not in self._scores:
                    self._scores[key] = _score(path, prompt, next(Scorer(reward).stream([path], prompt or None)))
                found.append(self._scores[key])
            yield found

    def sample(self, prompts: Sequence[str], per_prompt: int, seed: int, **settings: Any) -> Iterator[int]:
        """Sample images into the folder of samples, with their prompts; yield how many there are so far."""
        import torch

        pipe, done = self.pipe(), 0
        for prompt in prompts:
            for number in range(seed, seed + per_prompt):
                name = f"{hashlib.sha256(prompt.encode()).hexdigest()[:12]}_{number}"
                made: Any = pipe(prompt, generator=torch.Generator("cpu").manual_seed(number), **settings)  # pyright: ignore[reportCallIssue]
                image = png(made.images[0], prompt, seed=number, scheduler=pipe.scheduler, call=settings)
                write_atomically(self.samples / f"{name}.png", image)
                done += 1
                yield done

    # ------------------------------------------------------------------------------------------ pairs

    def pairs(self, images: Sequence[tuple[str, str]], order: str, reward: str) -> list[Pair]:
        """Return the pairs of images of one prompt: first those whose order is least sure, or at random."""
        by_prompt: dict[str, list[str]] = defaultdict(list)
        for path, prompt in images:
            by_prompt[prompt].append(path)
        rng, found = random.Random(0), []
        for prompt, paths in sorted(by_prompt.items()):
            if len(paths) * (len(paths) - 1) // 2 <= MOST_PAIRS:
                two = list(combinations(paths, 2))
            else:
                two = [(paths[a], paths[b]) for a, b in (rng.sample(range(len(paths)), 2) for _ in range(MOST_PAIRS))]
            found += [pair_of(prompt, images) for images in two]
        found = list(dict.fromkeys(found))
        rng.shuffle(found)
        return found if order == "random" else sorted(found, key=lambda pair: self._sureness(reward, pair))

    def _sureness(self, reward: str, pair: Pair) -> float:
        """Return by how many stds the totals of a pair differ; the reward is unsure near 0."""
        first, second = (self.known(reward, path, pair.prompt) for path in (pair.first, pair.second))
        if first is None or second is None or first.total is None or second.total is None:
            return float("inf")
        return abs(first.total - second.total) / max(1e-9, (first.uncertainty**2 + second.uncertainty**2) ** 0.5)

    def known(self, reward: str, path: str, prompt: str) -> Score | None:
        """Return a score that was computed already."""
        with suppress(OSError):
            return self._scores.get((reward, path, os.stat(path).st_mtime_ns, prompt))  # noqa: PTH116
        return None

    def agreement(self, reward: str) -> tuple[int, int]:
        """Return in how many of the decided choices with known scores the reward prefers the same image."""
        agreed = compared = 0
        for _, pair, choice in self.labels.choices():
            first, second = (self.known(reward, path, pair.prompt) for path in (pair.first, pair.second))
            totals = [each.total for each in (first, second) if each is not None and each.total is not None]
            if choice in ("first", "second") and len(totals) == 2:
                compared += 1
                agreed += (totals[0] > totals[1]) == (choice == "first")
        return agreed, compared


def _score(path: str, prompt: str, result: Any) -> Score:
    if result.output is None:
        return Score(path=path, prompt=prompt, error=result.error)
    output = result.output
    quality, match = (None if value is None else value.item() for value in (output.quality, output.correspondence))
    spread = output.details.get("uncertainty")
    uncertainty = 1.0 if spread is None else float(spread.flatten()[0])
    return Score(
        path=path,
        prompt=prompt,
        total=output.total.item(),
        quality=quality,
        correspondence=match,
        uncertainty=uncertainty,
    )


def with_prompt(path: str, text: str, source: str = PROMPTS[0]) -> Score:
    """Return an image with its prompt, or with the error why it has none; `source` is one of PROMPTS."""
    place: Any = source
    own = None
    try:
        if source == PROMPTS[0]:
            with suppress(ImageError):
                own = read_prompt(path)
        elif source != PROMPTS[1]:
            own = find_prompt(path, place)
    except ImageError as error:
        return Score(path=path, prompt="", error=str(error))
    return Score(path=path, prompt=own.text, raw_prompt=own.raw) if own else Score(path=path, prompt=text.strip())

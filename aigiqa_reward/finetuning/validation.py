"""Images of the same prompts and seeds again and again during a training, judged by the trained reward and another."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.compact import CompactImageTower, load_image_tower
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.reporting import draw_validation
from aigiqa_reward.finetuning.results import PER_IMAGE, SHOWN_PROMPTS, SHOWN_SEEDS, ValidationResult, picture_file
from aigiqa_reward.models.base import check_prompts
from aigiqa_reward.rewards.bound import device_of
from aigiqa_reward.rewards.factory import create_reward
from aigiqa_reward.rewards.reward import Reward
from aigiqa_reward.rewards.scorer import Scorer
from aigiqa_reward.rewards.specs import TOWER_FILES
from aigiqa_reward.types import PromptFeatures, RewardFunction, RewardOutput
from aigiqa_reward.utils.checks import check_reward, integer

_END = 0.5 / 255
"""Values as near to 0 or 1 as this, or beyond, are the first or the last of 8 bits."""

_SIDE = 224
"""Side in px of the square in which the tower compares images: that of its training."""


def saturation(decoded: Tensor) -> Tensor:
    """Share in [0, 1] of pixel values at the ends of the range or beyond; (B, 3, H, W) as decoded, before clamping.

    An overdriven decoder is how images most often cheat a reward: burnt colors, hard outlines.
    """
    return ((decoded <= _END) | (decoded >= 1 - _END)).double().flatten(1).mean(dim=1)


def chroma(images: Tensor) -> Tensor:
    """Mean distance from gray of images (B, 3, H, W) in [0, 1]: of (R - G, (R + G) / 2 - B).

    The opponent colors of Hasler & Süsstrunk 2003, "Measuring Colorfulness in Natural Images".
    """
    red, green, blue = images.double().unbind(dim=1)
    return torch.hypot(red - green, (red + green) / 2 - blue).flatten(1).mean(dim=1)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation over an image's luma (Rec. 601); (B, 3, H, W) in [0, 1]."""
    red, green, blue = images.double().unbind(dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).flatten(1).std(dim=1, correction=0)


class Looks:
    """What images show, as vectors to be compared: the embedded image tower's features.

    Chosen because they are always there and cheap (EfficientNet-Lite0, 0.4 GFLOP an image), and because they change
    with what is shown rather than with pixels: noise laid over equal images does not pass for variety, as it would
    with a distance of pixels.

    Args:
        device: where to compute.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.tower: CompactImageTower = load_image_tower(sha256=TOWER_FILES["towers/image.safetensors"]).to(device)

    @property
    def width(self) -> int:
        """Length of a vector."""
        return self.tower.width

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, width) float32 of unit length, of images (B, 3, H, W) in [0, 1]."""
        device = next(self.tower.parameters()).device
        squares = pixels.resize(images.to(device).float(), (_SIDE, _SIDE))
        return F.normalize(self.tower(squares).pooled.float(), dim=1)


def diversity(looks: Tensor) -> float:
    """Mean cosine distance in [0, 2] over the pairs of n images of one prompt; NaN for fewer than two.

    Args:
        looks: (n, width) of unit length.
    """
    count = len(looks)
    if count < 2:
        return float("nan")
    first, second = torch.triu_indices(count, count, offset=1)
    # Half the square of the difference is the cosine distance of unit vectors, and 0 for equal ones to the last bit.
    return float(((looks[first] - looks[second]).double().square().sum(dim=1) / 2).mean())


def colors(images: Tensor, decoded: Tensor) -> Mapping[str, Tensor]:
    """The measures of single images: what a file shows, (B, 3, H, W) in [0, 1], and what the decoder gave."""
    return {"saturation": saturation(decoded), "chroma": chroma(images), "contrast": contrast(images)}


CANDIDATES = ("compact", "mst_clipiqa", "tsp_mgs", "sc_agiqa", "cpa_iqa", "ma_agiqa")
"""Embedded systems that may be held out, the first that the trained reward does not use is. Chosen here: the two that
agree best with people and cost least stand first, then by cost."""


_HOLDERS = ("__self__", "__func__", "func", "args", "keywords")
"""What a bound method and a `functools.partial` keep."""


class QualityAlone:
    """A reward's quality as the total; its correspondence is told beside and counts for nothing.

    Quality of an embedded system does not depend on the prompt, so no text branch has a say.

    Args:
        reward: an embedded system.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    @property
    def name(self) -> str:
        """The system's name in the zoo."""
        return self.reward.name

    @property
    def device(self) -> torch.device:
        """Where images must be."""
        return self.reward.device

    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """As the reward does, for its correspondence."""
        return self.reward.encode_prompts(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None = None) -> RewardOutput:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]; `total` is the quality."""
        output = self.reward(images, prompts)
        return RewardOutput(total=output.quality, quality=output.quality, correspondence=output.correspondence)


def default_holdout(reward: Any, device: torch.device | None = None) -> QualityAlone:
    """A second embedded system, offline, to judge what is trained on `reward`.

    It is `compact`; `mst_clipiqa` where that is the trained one; for a composite of both the next one.

    What it can see: an image that only the trained head likes. Every system has a head of its own, fitted apart.
    What it cannot see: correspondence, since all embedded systems read prompts with one text tower, whose faults they
    share; pictures that have become good and no longer show the prompt keep their held-out reward. Its correspondence
    stands beside in the figures, and no decision uses it. Nor does it see what deceives the image tower
    (EfficientNet-Lite0) that they share as well, `compact` beside a second one. A reward of your own, by people's
    preferences or on other towers, sees more.

    Args:
        reward: the trained reward. Every Reward within a module (a CompositeReward, a wrapper of your own) is found,
            and what a function or an object of yours refers to.
        device: where to put the second system, where the trained reward does not say on which it is.

    Returns:
        The second system, on the trained reward's device.

    Raises:
        ValueError: the trained reward uses every embedded system.
    """
    used = {part.name for part in _rewards_in(reward)}
    left = [name for name in CANDIDATES if name not in used]
    if not left:
        raise ValueError(
            "holdout: the trained reward uses every embedded system, so that none is left to be held out; pass a "
            "reward or a function f(images, prompts) of your own as holdout"
        )
    return QualityAlone(create_reward(left[0], device=device_of(reward) or device))


def _rewards_in(found: Any, depth: int = 3) -> Iterator[Reward]:
    """Rewards that are part of a module, or that a function or another object refers to."""
    if isinstance(found, nn.Module):
        yield from (part for part in found.modules() if isinstance(part, Reward))
    elif depth and not (inspect.ismodule(found) or inspect.isclass(found)):
        for other in _referred_to(found):
            yield from _rewards_in(other, depth - 1)


def _referred_to(found: Any) -> list[Any]:
    if isinstance(found, list | tuple | set):
        return list(found)
    if isinstance(found, dict):
        return list(found.values())
    others = [*getattr(found, "__dict__", {}).values(), *(getattr(found, name, None) for name in _HOLDERS)]
    if inspect.isfunction(found):
        seen = inspect.getclosurevars(found)
        others += [*seen.nonlocals.values(), *seen.globals.values()]
    return others


TILE = 256
"""Longer side in px above which images are scaled down for the pictures; chosen here, sharp enough to be judged."""


class Validation:
    """Makes and judges the validation images.

    Image j of a prompt is `pipe(prompt, generator=torch.Generator("cpu").manual_seed(j), **pipe_kwargs)` with the
    adapter as it stands, whatever was drawn in training, in every validation and however many processes share the work.

    Args:
        tools: the pipeline's parts, the trained reward, the processes.
        prompts: to validate on; none of them should be trained on.
        seeds: images a prompt. From two on there is a diversity.
        holdout: a Reward or any RewardFunction that is not trained on, judged by its total; None is `default_holdout`.
        folder: where the main process writes each result and its picture (`ValidationResult.write`, `draw_validation`);
            None writes nothing.
        batch_size: images made and scored at a time.

    Raises:
        TypeError: prompts or counts of another type, a holdout that cannot be called.
        ValueError: no prompts, a blank one, or no images.
    """

    def __init__(
        self,
        tools: TrainingContext,
        prompts: Sequence[str],
        *,
        seeds: int = 4,
        holdout: RewardFunction | None = None,
        folder: str | Path | None = None,
        batch_size: int = 4,
    ) -> None:
        check_prompts(prompts)
        self.tools = tools
        self.prompts = tuple(prompts)
        self.seeds = integer("seeds", seeds, least=1)
        self.batch_size = integer("batch_size", batch_size, least=1)
        self.holdout: Any = default_holdout(tools.reward) if holdout is None else check_reward(holdout)
        self.folder = None if folder is None else Path(folder)
        self._judge = Scorer(self.holdout, batch_size=self.batch_size)
        self._looks = Looks(tools.accelerator.device)

    @torch.no_grad()
    def run(self, step: int) -> ValidationResult:
        """Make and judge all images as the weights are now; equal in all processes.

        Every process has to call this. Images with NaN or infinite pixels have NaN scores and are counted.

        Args:
            step: steps of the optimizer so far; 0 before the first.
        """
        began = time.perf_counter()
        count, processes = len(self.prompts) * self.seeds, self.tools.accelerator.num_processes
        share = -(-count // processes)
        # All take equally many, so that they can be gathered; a last round begins anew and is dropped.
        own = [(self.tools.accelerator.process_index + i * processes) % count for i in range(share)]
        numbers, tiles = [], []
        for start in range(0, share, self.batch_size):
            images, measured = self._batch(own[start : start + self.batch_size])
            numbers.append(measured)
            tiles.append(_tiles(images))
        rows = self._gathered(torch.cat(numbers), count)
        shown = [p * self.seeds + s for p in range(len(self.prompts))[:SHOWN_PROMPTS] for s in range(self._shown_seeds)]
        pictures = self._gathered_pictures(torch.cat(tiles), shown, count)
        result = self._result(step, rows, pictures, began)
        if self.folder is not None and self.tools.accelerator.is_main_process:
            result.write(self.folder)
            draw_validation(result, picture_file(self.folder, step))
        return result

    @property
    def _shown_seeds(self) -> int:
        return min(self.seeds, SHOWN_SEEDS)

    # ----------------------------------------------------------------------------------------- one batch

    def images(self, rows: Sequence[int]) -> Tensor:
        """Images (B, 3, H, W) as decoded, not clamped; row r is seed r % seeds of prompt r // seeds."""
        prompts = [self.prompts[row // self.seeds] for row in rows]
        generators = [torch.Generator("cpu").manual_seed(row % self.seeds) for row in rows]
        rollout = self.tools.rollout
        with torch.no_grad():
            return rollout.decode(rollout.run(rollout.start(self.tools.encode(prompts), generators)).latents)

    def _batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1], and (B, len(PER_IMAGE) + width) their numbers and looks, float64, CPU."""
        decoded = self.images(rows).float()
        whole = decoded.isfinite().flatten(1).all(dim=1)
        images = decoded.clamp(0, 1)
        table = torch.full((len(rows), len(PER_IMAGE) + self._looks.width), float("nan"), dtype=torch.float64)
        if bool(whole.any()):
            kept = images[whole]
            prompts = [self.prompts[row // self.seeds] for row, fine in zip(rows, whole.tolist(), strict=True) if fine]
            trained, held = self.tools.score(kept, prompts), self._judge.score(kept, prompts)
            named = {"reward": trained.total, "quality": trained.quality, "correspondence": trained.correspondence}
            named |= {"holdout": held.total, "holdout_correspondence": held.correspondence}
            named |= colors(kept, decoded[whole])
            columns = [_column(named[name], len(kept)) for name in PER_IMAGE]
            table[whole.cpu()] = torch.cat([torch.stack(columns, dim=1), self._looks(kept).double().cpu()], dim=1)
        return images, table

    def _result(self, step: int, rows: Tensor, pictures: Tensor, began: float) -> ValidationResult:
        shape = len(self.prompts), self.seeds
        numbers = {name: rows[:, i].reshape(shape).numpy() for i, name in enumerate(PER_IMAGE)}
        looks = rows[:, len(PER_IMAGE) :].reshape(*shape, -1)
        varied = [diversity(of_prompt[of_prompt.isfinite().all(dim=1)]) for of_prompt in looks]
        height, width = pictures.shape[2:]
        tiles = pictures.reshape(-1, self._shown_seeds, 3, height, width).permute(0, 1, 3, 4, 2).contiguous()
        return ValidationResult(
            step=step,
            prompts=self.prompts,
            numbers=numbers,
            diversity=np.array(varied),
            nonfinite=int((~rows[:, -1].isfinite()).sum()),
            tiles=tiles.numpy(),
            seconds=time.perf_counter() - began,
        )

    # ----------------------------------------------------------------------------------------- processes

    def _gathered(self, rows: Tensor, count: int) -> Tensor:
        """Rows of all processes, in the order of the images."""
        processes = self.tools.accelerator.num_processes
        if processes == 1:
            return rows
        # Some devices know no float64, and 32 bits hold what these numbers mean.
        every = self.tools.gather(rows.float().to(self.tools.accelerator.device)).double().cpu()
        share = len(rows)
        return torch.stack([every[row % processes * share + row // processes] for row in range(count)])

    def _gathered_pictures(self, tiles: Tensor, shown: Sequence[int], count: int) -> Tensor:
        """Tiles (N, 3, h, w) uint8 of the rows to be shown, of whichever process made them."""
        processes, index = self.tools.accelerator.num_processes, self.tools.accelerator.process_index
        if processes == 1:
            return tiles[torch.tensor(shown)]
        made = [[row for row in shown if row % processes == process] for process in range(processes)]
        most = max(map(len, made))
        own = torch.zeros((most, *tiles.shape[1:]), dtype=torch.uint8)
        for place, row in enumerate(made[index]):
            own[place] = tiles[row // processes]
        every = self.tools.gather(own.to(self.tools.accelerator.device)).cpu()
        places = {row: process * most + i for process, rows in enumerate(made) for i, row in enumerate(rows)}
        return torch.stack([every[places[row]] for row in shown])


def _column(values: Tensor | None, count: int) -> Tensor:
    """(B,) float64 on the CPU, NaN where a reward does not say."""
    if values is None:
        return torch.full((count,), float("nan"), dtype=torch.float64)
    return values.detach().double().cpu()


def _tiles(images: Tensor) -> Tensor:
    """Copies (B, 3, h, w) uint8 on the CPU, at most TILE px a side; NaN is black."""
    images = images.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0)
    height, width = images.shape[2:]
    if max(height, width) > TILE:
        scale = TILE / max(height, width)
        images = pixels.resize(images, (max(1, round(height * scale)), max(1, round(width * scale))))
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)

"""Validation of a training: images of fixed prompts and seeds, scored by the trained and a held-out reward."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigiqa_reward.encoders.compact import CompactImageTower, load_image_tower
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.reporting import draw_validation
from aigiqa_reward.finetuning.results import PER_IMAGE, SHOWN_PROMPTS, SHOWN_SEEDS, ValidationResult
from aigiqa_reward.images import finite_rows, resize
from aigiqa_reward.rewards.bound import BoundReward, device_of, reward_name
from aigiqa_reward.rewards.factory import create_reward
from aigiqa_reward.rewards.published import PUBLISHED, cached_weights
from aigiqa_reward.rewards.reward import Reward
from aigiqa_reward.rewards.specs import TOWER_FILES
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.run_folder import reward_identity

_END = 0.5 / 255  # distance from 0 or 1 within which a value becomes the first or last of 8 bits
_SIDE = 224  # side in px of the square in which the tower compares images: that of its training


def saturation(decoded: Tensor) -> Tensor:
    """Return the share (B,) of pixel values at the ends of the range, of images (B, 3, H, W) before clamping."""
    return ((decoded <= _END) | (decoded >= 1 - _END)).double().flatten(1).mean(dim=1)


def chroma(images: Tensor) -> Tensor:
    """Return the mean length (B,) of the opponent colors (R - G, (R + G) / 2 - B); Hasler & Süsstrunk 2003."""
    red, green, blue = images.double().unbind(dim=1)
    return torch.hypot(red - green, (red + green) / 2 - blue).flatten(1).mean(dim=1)


def contrast(images: Tensor) -> Tensor:
    """Return the standard deviation (B,) of the luma (Rec. 601) of images (B, 3, H, W)."""
    red, green, blue = images.double().unbind(dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).flatten(1).std(dim=1, correction=0)


class Looks:
    """Feature vectors of images from the embedded image tower; unlike pixels they do not count noise as diversity."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.tower: CompactImageTower = load_image_tower(sha256=TOWER_FILES["towers/image.safetensors"]).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, width) float32 of unit length, of images (B, 3, H, W) in [0, 1]."""
        device = next(self.tower.parameters()).device
        squares = resize(images.to(device).float(), (_SIDE, _SIDE))
        return F.normalize(self.tower(squares).pooled.float(), dim=1)


def diversity(looks: Tensor) -> float:
    """Return the mean cosine distance in [0, 2] over all pairs of unit vectors (n, width); NaN for fewer than two."""
    first, second = torch.triu_indices(len(looks), len(looks), offset=1)
    # Half the squared difference is the cosine distance of unit vectors, and exactly 0 for equal ones.
    return float(((looks[first] - looks[second]).double().square().sum(dim=1) / 2).mean())


CANDIDATES = ("compact", "mst_clipiqa", "tsp_mgs", "sc_agiqa", "cpa_iqa", "ma_agiqa")
"""Embedded systems in the order in which they are held out: the two cheapest that agree best with people, then by cost.
"""

PUBLISHED_CANDIDATES = ("pickscore", "hpsv2.1", "imagereward")
"""Published rewards in the order in which they are held out."""


def default_holdout(reward: RewardFunction, device: torch.device | None = None) -> Reward:
    """Create a reward that is not trained on.

    If the trained reward is or contains a published one, it is the first of PUBLISHED_CANDIDATES of another family
    (`rewards.published.PUBLISHED`) whose weights are in the Hub's cache; nothing is downloaded.

    Otherwise it is the first embedded system of CANDIDATES that is not part of the trained reward. It detects images
    that only the trained reward likes, and a loss of correspondence: compact has image towers and a last text layer of
    its own, but five of six text layers are shared, and the five other systems share their towers. A reward from human
    preferences detects more.

    Rewards that a plain function calls are not found.
    """
    parts = reward.modules() if isinstance(reward, nn.Module) else ()
    used = {part.name for part in parts if isinstance(part, Reward)}
    device = device_of(reward) or device
    families = {PUBLISHED[name].family for name in used & PUBLISHED.keys()}
    for name in PUBLISHED_CANDIDATES if families else ():
        weights = cached_weights(name)
        if weights is not None and PUBLISHED[name].family not in families:
            return create_reward(name, weights=weights, device=device)
    if not (left := [name for name in CANDIDATES if name not in used]):
        raise ValueError("holdout: the trained reward uses every embedded system; pass another reward as holdout")
    return create_reward(left[0], device=device)


def frozen(reward: RewardFunction) -> RewardFunction:
    """Freeze a reward that is a module."""
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval()
    return reward


def held_out(context: TrainingContext, holdout: RewardFunction | Literal["auto"]) -> RewardFunction:
    """Return the held-out reward, frozen, and refuse the trained one."""
    if isinstance(holdout, str) and holdout == "auto":
        return default_holdout(context.reward, context.rollout.family.device)
    same = isinstance(holdout, nn.Module) and reward_identity(holdout) == reward_identity(context.reward)
    if holdout is context.reward or same:
        raise ValueError(
            f"holdout: expected a reward that is not trained on, got the trained one, {reward_name(context.reward)}"
        )
    return frozen(holdout)


TILE = 256
"""Longer side in px above which thumbnails are scaled down."""


class Validation:
    """Samples and scores the validation images.

    Image j of a prompt is `pipe(prompt, generator=torch.Generator("cpu").manual_seed(j), **pipe_kwargs)` with the
    current adapter, in every validation and for any number of processes.

    `seeds` is the number of images per prompt, of which `batch_size` are sampled and scored at a time. The main process
    writes each result and its picture into `folder`, if there is one.
    """

    def __init__(
        self,
        context: TrainingContext,
        prompts: Sequence[str],
        holdout: RewardFunction,
        *,
        seeds: int = 4,
        folder: Path | None = None,
        batch_size: int = 4,
    ) -> None:
        self.context, self.prompts, self.holdout = context, tuple(prompts), BoundReward(holdout)
        self.seeds, self.folder, self.batch_size = seeds, folder, batch_size
        self._looks = Looks(context.accelerator.device)

    @torch.no_grad()
    def run(self, step: int) -> ValidationResult:
        """Sample and score all images with the current weights; every process must call it and gets the same result."""
        from accelerate.utils import gather_object

        began = time.perf_counter()
        accelerator = self.context.accelerator
        total, processes = len(self.prompts) * self.seeds, accelerator.num_processes
        # A sharded denoiser is called by all or none: a process with one image fewer makes the first one again.
        own = range(accelerator.process_index, -(-total // processes) * processes, processes)
        rows = [row if row < total else 0 for row in own]
        judged = [self._judged(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]
        gathered = gather_object([image for batch in judged for image in batch])
        images = sorted({image[0]: image for image in reversed(gathered)}.values(), key=lambda image: image[0])
        result = self._result(step, np.stack([image[1] for image in images]), [image[2] for image in images], began)
        if self.folder is not None and accelerator.is_main_process:
            result.write(self.folder)
            draw_validation(result, self.folder / f"step-{step:06d}.png")
        return result

    def images(self, rows: Sequence[int]) -> Tensor:
        """Sample images (B, 3, H, W), not clamped; row r is seed r % seeds of prompt r // seeds."""
        generators = [torch.Generator("cpu").manual_seed(row % self.seeds) for row in rows]
        rollout = self.context.rollout
        with torch.no_grad():
            state = rollout.start(self.context.encode(self._prompts_of(rows)), generators)
            return rollout.decode(rollout.run(state).latents)

    def _prompts_of(self, rows: Sequence[int]) -> list[str]:
        return [self.prompts[row // self.seeds] for row in rows]

    def _judged(self, rows: Sequence[int]) -> list[tuple[int, np.ndarray, np.ndarray | None]]:
        """Return for each row its place, its numbers and features (NaN if not finite), and its thumbnail if shown."""
        decoded = self.images(rows).float()
        images, fine = decoded.clamp(0, 1), finite_rows(decoded)
        table = np.full((len(rows), len(PER_IMAGE) + self._looks.tower.encoder.width), np.nan)
        if bool(fine.any()):
            prompts = [prompt for prompt, kept in zip(self._prompts_of(rows), fine.tolist(), strict=True) if kept]
            table[fine.cpu().numpy()] = self._measured(images[fine], decoded[fine], prompts)
        tiles = _tiles(images)
        shown = [row // self.seeds < SHOWN_PROMPTS and row % self.seeds < SHOWN_SEEDS for row in rows]
        return [(row, table[i], tiles[i] if shown[i] else None) for i, row in enumerate(rows)]

    def _measured(self, images: Tensor, decoded: Tensor, prompts: list[str]) -> np.ndarray:
        trained, held = self.context.bound.score(images, prompts), self.holdout.score(images, prompts)
        named = {
            "reward": trained.total,
            "quality": trained.quality,
            "correspondence": trained.correspondence,
            "holdout": held.total,
            "holdout_correspondence": held.correspondence,
            "saturation": saturation(decoded),
            "chroma": chroma(images),
            "contrast": contrast(images),
        }
        nothing = torch.full((len(images),), float("nan"))
        found = [nothing if (values := named[name]) is None else values for name in PER_IMAGE]
        columns = torch.stack([values.double().cpu() for values in found], dim=1)
        return torch.cat([columns, self._looks(images).double().cpu()], dim=1).numpy()

    def _result(self, step: int, rows: np.ndarray, tiles: list[np.ndarray | None], began: float) -> ValidationResult:
        rows = rows.reshape(len(self.prompts), self.seeds, -1)
        numbers = {name: rows[..., i] for i, name in enumerate(PER_IMAGE)}
        looks = torch.from_numpy(rows[..., len(PER_IMAGE) :])
        varied = [diversity(of_prompt[of_prompt.isfinite().all(dim=1)]) for of_prompt in looks]
        shown = np.stack([tile for tile in tiles if tile is not None])
        return ValidationResult(
            step=step,
            prompts=self.prompts,
            numbers=numbers,
            diversity=np.array(varied),
            nonfinite=int(np.isnan(numbers["saturation"]).sum()),
            tiles=shown.reshape(-1, min(self.seeds, SHOWN_SEEDS), *shown.shape[1:]),
            seconds=time.perf_counter() - began,
        )


def _tiles(images: Tensor) -> np.ndarray:
    """Return thumbnails (B, h, w, 3) uint8 of at most TILE px per side; NaN is black."""
    images, scale = images.nan_to_num(nan=0.0), TILE / max(images.shape[2:])
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in images.shape[2:])
        images = resize(images, (height, width))
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def warn_of_weak(prompts: Sequence[str], trained: Sequence[str], seeds: int) -> None:
    """Warn of validation prompts that cannot show what they should."""
    known = set(trained)
    if both := [prompt for prompt in prompts if prompt in known]:
        warnings.warn(
            f"validation_prompts: {len(both)} of {len(prompts)} are training prompts too (first: {both[0]!r}), and do "
            "not show how other prompts change",
            stacklevel=5,
        )
    if len(prompts) * seeds == 1:
        warnings.warn(
            "validation_prompts: one image gives no estimate of the noise, so that reward hacking cannot be detected; "
            "pass eight prompts or more",
            stacklevel=5,
        )

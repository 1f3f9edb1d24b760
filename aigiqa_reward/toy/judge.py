"""The judge of the embedded world: a classifier that shares no weight with any reward, and so shows reward hacking.

It was trained on composed pictures alone, never on generated ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.toy.degradations import DEGRADATIONS
from aigiqa_reward.toy.world import COLOR_NAMES, NOUNS, SIDE, read_subject
from aigiqa_reward.types import Images, RewardOutput
from aigiqa_reward.utils.isolation import building, isolated
from aigiqa_reward.utils.weights import ASSETS, load_strictly, read_weights

STRONG = 0.4
"""Least degradation at which a picture is not accepted, above the judge's levels of clean pictures."""

_SHA256 = "66da39860707b38c1e69423acf4b9bbcd50e1f2fdd8498acc0933351ee8fcc42"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Log-probabilities of nouns and background colors in B pictures, and levels of degradation in [0, 1]."""

    nouns: Float[Tensor, "batch 64"]
    colors: Float[Tensor, "batch 8"]
    degradation: Float[Tensor, "batch 3"]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.body(features) + self.skip(features))


class Judge(nn.Module):
    """A classifier of thing, background color and degradation, with random weights; `load_judge` loads trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            _Block(32, 32, 1),
            _Block(32, 64, 2),
            _Block(64, 64, 1),
            _Block(64, 128, 2),
            _Block(128, 128, 1),
        )
        self.noun = nn.Linear(128, len(NOUNS))
        self.colour = nn.Linear(128, len(COLOR_NAMES))
        self.degradation = nn.Linear(128, len(DEGRADATIONS))

    def logits(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits (B, 64), (B, 8) and (B, 3) for pictures (B, 3, 64, 64) in [0, 1]."""
        pooled = self.trunk(2 * images - 1).mean(dim=(2, 3))
        return self.noun(pooled), self.colour(pooled), self.degradation(pooled)

    @isolated()
    def examine(self, images: Images) -> Verdict:
        """Examine pictures (B, 3, H, W) in [0, 1], of any size from 16 px, resized to 64 x 64."""
        pixels.check(images)
        if images.shape[2:] != (SIDE, SIDE):
            images = pixels.resize(images, (SIDE, SIDE))
        noun, color, degradation = self.logits(images.to(self.noun.weight.dtype))
        nouns, colors = noun.log_softmax(dim=1), color.log_softmax(dim=1)
        return Verdict(nouns=nouns, colors=colors, degradation=degradation.sigmoid())

    @isolated()
    def forward(self, images: Images, prompts: Sequence[str]) -> RewardOutput:
        """Score pictures (B, 3, H, W) in [0, 1] by their B prompts.

        `total` and `correspondence` are the log-probability of the prompt's noun plus that of its color, at most 0, in
        nats; `quality` is minus the mean level of degradation, in [-1, 0].
        """
        verdict = self.examine(images)
        nouns, colors = subject_indices(prompts, count=images.shape[0])
        rows = torch.arange(len(nouns))
        score = verdict.nouns[rows, nouns] + verdict.colors[rows, colors]
        return RewardOutput(total=score, quality=-verdict.degradation.mean(dim=1), correspondence=score)

    @torch.no_grad()
    def recognizes(self, images: Images, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (B,) whether the likeliest noun is the prompt's, and (B,) whether the color is."""
        return _recognized(self.examine(images), prompts)

    @torch.no_grad()
    def accepts(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return (B,) whether noun and color are recognized and every degradation is below STRONG."""
        verdict = self.examine(images)
        noun, color = _recognized(verdict, prompts)
        return noun & color & (verdict.degradation.amax(dim=1).cpu() < STRONG)


def _recognized(verdict: Verdict, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    nouns, colors = subject_indices(prompts, count=len(verdict.nouns))
    return (verdict.nouns.argmax(dim=1).cpu() == nouns), (verdict.colors.argmax(dim=1).cpu() == colors)


def subject_indices(prompts: Sequence[str], *, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices (B,) of the nouns and colors of `count` prompts."""
    if not isinstance(prompts, list | tuple):
        raise TypeError(f"prompts: expected a list of {count} texts, got {prompts!r}; pass [text] * {count}")
    if len(prompts) != count:
        raise ValueError(f"prompts: expected {count}, one per image, got {len(prompts)}")
    subjects = torch.tensor([_known(prompt) for prompt in prompts], dtype=torch.long, device="cpu").reshape(count, 2)
    return subjects[:, 0], subjects[:, 1]


def _known(prompt: str) -> tuple[int, int]:
    subject = read_subject(prompt)
    if subject.noun is None or subject.color is None:
        missing, words = ("thing", NOUNS) if subject.noun is None else ("background color", COLOR_NAMES)
        raise ValueError(f"prompts: the judge knows no {missing} in {prompt!r}; expected one of {', '.join(words)}")
    return subject.noun, subject.color


@building()
def load_judge(*, device: str | torch.device = "cpu") -> Judge:
    """Load the trained judge, frozen, in eval mode; gradients reach the pixels.

    Example:
        >>> import torch
        >>> from aigiqa_reward.toy.judge import load_judge
        >>> judge = load_judge()
        >>> judge.accepts(torch.zeros(1, 3, 64, 64), ["a red apple on a blue background"])
        tensor([False])
    """
    path = ASSETS / "judge" / "model.safetensors"
    judge = Judge()
    load_strictly(judge, read_weights(path, expected_sha256=_SHA256), source=str(path))
    return judge.eval().requires_grad_(False).to(device)

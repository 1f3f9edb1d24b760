"""Captions, right and wrong, of the match training, and MiniLM's states of them before the layer that it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data import Sources, digest, read_flickr8k, read_visor
from negatives import wrong_caption
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward.encoders.compact import CompactTextTower, load_text_tower
from aigiqa_reward.rewards.specs import SPECS
from aigiqa_reward.toy.world import COLOR_NAMES, COLORS, NOUNS, WORDINGS, caption
from aigiqa_reward.utils.weights import write_weights

LAYER = 5
"""Number of the text tower's layer that is trained, its last."""

WRONG = 6
"""Wrong captions drawn for a prompt of AGIQA-3K and VISOR; one for a caption of Flickr8k, four for one of the world."""

BATCH = 256


class Wrong(NamedTuple):
    """A wrong caption's number, and its characters from `start` to `end`, which are wrong."""

    text: int
    start: int
    end: int


class Caption(NamedTuple):
    """A right caption's number, and wrong ones."""

    text: int
    wrong: tuple[Wrong, ...]


class Captions:
    """Distinct texts, and of each data set the captions of its images, or of its pairs of thing and color."""

    def __init__(self, sources: Sources) -> None:
        self._numbers: dict[str, int] = {}
        self.of: dict[str, list[list[Caption]]] = {}
        if sources.flickr8k is not None:
            rng = np.random.default_rng([0, 0])
            photographs = read_flickr8k(sources.flickr8k).values()
            self.of["flickr8k"] = [[self._add(text, 1, rng) for text in texts] for texts in photographs]
        self.of["agiqa3k"] = self._prompts(sources.images().prompts, np.random.default_rng([0, 1]))
        if sources.visor is not None:
            prompts = list(read_visor(sources.visor).values())
            self.of["visor"] = self._prompts(prompts, np.random.default_rng([0, 2]))
        rng, wordings = np.random.default_rng([0, 3]), range(len(WORDINGS))
        pairs = [(noun, color) for noun in range(len(NOUNS)) for color in range(len(COLORS))]
        self.of["world"] = [[self._world(*pair, wording, rng) for wording in wordings] for pair in pairs]

    @property
    def texts(self) -> list[str]:
        return list(self._numbers)

    def _number(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    def _add(self, text: str, count: int, rng: np.random.Generator) -> Caption:
        drawn = [wrong_caption(text, rng) for _ in range(count)]
        wrong = tuple(Wrong(self._number(each.text), *each.span) for each in drawn if each is not None)
        return Caption(self._number(text), wrong)

    def _prompts(self, prompts: Sequence[str], rng: np.random.Generator) -> list[list[Caption]]:
        known = {prompt: self._add(prompt, WRONG, rng) for prompt in dict.fromkeys(prompts)}
        return [[known[prompt]] for prompt in prompts]

    def _world(self, noun: int, color: int, wording: int, rng: np.random.Generator) -> Caption:
        """A caption of the emoji world; wrong are the thing or the color, two of each."""
        wrong = []
        for _ in range(2):
            other = int((noun + rng.integers(1, len(NOUNS))) % len(NOUNS))
            text = caption(other, color, wording)
            wrong.append(self._wrong(text, text.find(NOUNS[other]), NOUNS[other]))
            other = int((color + rng.integers(1, len(COLORS))) % len(COLORS))
            text = caption(noun, other, wording)
            thing = text.find(NOUNS[noun])
            starts = [i for i in range(len(text)) if text.startswith(COLOR_NAMES[other], i)]
            start = next(i for i in starts if not thing <= i < thing + len(NOUNS[noun]))  # not the red of a red apple
            wrong.append(self._wrong(text, start, COLOR_NAMES[other]))
        return Caption(self._number(caption(noun, color, wording)), tuple(wrong))

    def _wrong(self, text: str, start: int, words: str) -> Wrong:
        return Wrong(self._number(text), start, start + len(words))


@dataclass(frozen=True, kw_only=True)
class TextStates:
    """States (N, 384) of all tokens of all texts in half precision, before LAYER.

    Attributes:
        states: the states.
        spans: (N, 2) characters of each token.
        first: (T + 1,) number of each text's first token.
    """

    states: Tensor
    spans: Tensor
    first: Tensor

    def read(self, texts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states (P, L, 384) of texts, their mask (P, L), False at padding, and spans (P, L, 2)."""
        parts = [slice(int(self.first[text]), int(self.first[text + 1])) for text in texts]
        length = max(part.stop - part.start for part in parts)
        states = torch.zeros(len(parts), length, self.states.shape[1])
        mask, spans = torch.zeros(len(parts), length, dtype=torch.bool), torch.zeros(len(parts), length, 2)
        for row, part in enumerate(parts):
            count = part.stop - part.start
            states[row, :count], spans[row, :count] = self.states[part].float(), self.spans[part].float()
            mask[row, :count] = True
        return states, mask, spans


def load_states(texts: list[str], runs: Path) -> tuple[TextStates, CompactTextTower]:
    """Load the texts' states, or compute and store them first, in about eight minutes on one core; and the tower."""
    path = runs / f"texts-{digest(texts)}.safetensors"
    tower = load_text_tower(sha256=SPECS["compact"].sha256["towers/text.safetensors"])
    if not path.exists():
        encoded = [tower.tokenizer.encode(text) for text in texts]
        lengths = torch.tensor([len(each.ids) for each in encoded])
        first = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(dim=0)])
        states = torch.empty(int(first[-1]), tower.width, dtype=torch.float16)
        for rows in tqdm(lengths.argsort(stable=True).split(BATCH), desc="texts", unit="batch", position=1):
            found = _states(tower, [encoded[row].ids for row in rows])
            for row, each in zip(rows.tolist(), found, strict=True):
                states[first[row] : first[row + 1]] = each
        spans = torch.tensor([span for each in encoded for span in each.offsets], dtype=torch.int16)
        write_weights(path, {"states": states, "spans": spans, "first": first})
    return TextStates(**load_file(path)), tower


@torch.inference_mode()
def _states(tower: CompactTextTower, ids: list[list[int]]) -> list[Tensor]:
    length = max(map(len, ids))
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.tensor([[place < len(row) for place in range(length)] for row in ids])
    states = tower.norm(tower.words(padded) + tower.positions(torch.arange(length)))
    for layer in tower.layers.layers[:LAYER]:
        states = layer(states, src_key_padding_mask=~mask)
    return [row[: len(own)] for row, own in zip(states, ids, strict=True)]

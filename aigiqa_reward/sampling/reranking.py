"""Ranks images that exist already; needs no pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.sampling.candidates import BestOfNOutput, Picture, Tally, conclude
from aigiqa_reward.sampling.checks import check_prompt, check_reward, check_text
from aigiqa_reward.scorer import Scorer
from aigiqa_reward.selection import integer

_BATCH = 8
"""Images read and scored at once; chosen here, so that a thousand files need the memory of eight."""


def rerank(images: Any, prompt: Any, reward: Any, top_k: Any = None) -> BestOfNOutput:
    """Rank existing images of one prompt.

    Args:
        images: a list of PIL images, paths, arrays and tensors, of any and mixed sizes (see `images.load`),
            or a batch (B, 3, H, W) in [0, 1]. They are read in order, a few at a time.
        prompt: the text that they should show; None ranks by quality alone, if the reward can.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput`.
        top_k: how many images to return, in [1, number of images]; by default all.

    Returns:
        Best first, ties to the earlier. `.seeds` are the indices of the inputs; `.images` are the images as
        they were scored: RGB, upright, transparency on white.

    Warns:
        UserWarning: once, if images were dropped: unreadable, NaN or infinite pixels, or given NaN or infinity by the
            reward.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: no images, a blank prompt, none where the reward needs one, or `top_k` out of range.
        NothingRankedError: if no image could be ranked.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import create_reward, rerank
        >>> pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
        >>> result = rerank(pictures, "a red square", create_reward("compact"), top_k=1)
        >>> len(result.images), result.seeds[0] in range(3), len(result.all_scores)
        (1, True, 3)
    """
    sources = _check_sources(images)
    text = check_prompt(prompt)
    if text is not None:
        check_text(text, "prompt", "pass the text that the images should show, or None to rank by quality alone")
    top_k = len(sources) if top_k is None else integer("top_k", top_k, least=1)
    if top_k > len(sources):
        raise ValueError(f"top_k: expected at most {len(sources)}, the number of images, got {top_k}; ask for fewer")
    tally = Tally(top_k)
    for result in Scorer(check_reward(reward), batch_size=_BATCH).stream(sources, text):
        source = sources[result.index]
        tally.add([result.index], [result.error], result.output, lambda _, source=source: _picture(source))
    output = tally.output()
    conclude(output, top_k, name="image", stacklevel=3)
    return output


def _picture(source: Any) -> Picture:
    return Picture(image=pixels.to_pil(pixels.load(source)[None])[0])


def _check_sources(images: Any) -> Sequence[Any]:
    if isinstance(images, Tensor | np.ndarray):
        if images.ndim != 4:
            raise ValueError(
                f"images: expected a batch of 4 dimensions, got shape {tuple(images.shape)}; "
                "put single images in a list"
            )
        sources: Sequence[Any] = list(images)
    elif isinstance(images, list | tuple):
        sources = images
    else:
        raise TypeError(
            f"images: expected a list of images or a tensor batch, got {type(images).__name__}; put it in a list"
        )
    if not sources:
        raise ValueError("images: expected at least one image, got none; pass the candidates to rank")
    return sources

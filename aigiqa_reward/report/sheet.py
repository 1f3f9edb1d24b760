"""Contact sheets: all candidates of one prompt, with their scores, in one picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from aigiqa_reward.report._style import (
    CARD,
    INK,
    MUTED,
    PADDING,
    PAPER,
    WINNER,
    Box,
    draw_card,
    draw_row,
    fitted,
    font,
    number,
    printable,
    wrapped,
)
from aigiqa_reward.sampling.candidates import BestOfNOutput

_MARGIN, _GAP = 36, 22  # px around the sheet, between cards
_TITLE, _HEADING, _TEXT, _SMALL = 24, 18, 14, 12  # font sizes in px
_WIDTH = 1152
"""Width in px that the images of a row share, so that a sheet fits a laptop's screen."""

_SMALLEST, _LARGEST = 192, 512
"""Limits in px of an image's longer side: the first leaves room for the numbers below it."""

_TITLE_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row of a BestOfNOutput; `outcome` is why it has no image or no place among the winners."""

    seed: int
    total: float
    quality: float
    correspondence: float | None
    place: int | None
    outcome: str

    @property
    def pruned(self) -> bool:
        """Whether it was pruned."""
        return self.outcome.startswith("pruned")


def candidates(output: BestOfNOutput) -> Iterator[Candidate]:
    """Iterate over all candidates in candidate order; `place` is 0 for the winner, None for those that are not kept."""
    places = {seed: place for place, seed in enumerate(output.seeds)}
    known = output.all_correspondence or [None] * len(output.all_seeds)
    rows = zip(output.all_seeds, output.all_scores, output.all_quality, known, strict=True)
    for seed, total, quality, correspondence in rows:
        outcome = output.dropped.get(seed, "")
        if seed not in output.dropped and math.isnan(total):
            last = output.previews.get(seed, ())[-1:]
            outcome = f"pruned after {last[0].step} of {last[0].steps} steps" if last else "pruned"
        yield Candidate(
            seed=seed,
            total=total,
            quality=quality,
            correspondence=correspondence,
            place=places.get(seed),
            outcome=outcome,
        )


def summary(output: BestOfNOutput) -> list[str]:
    """Return how many candidates there are, were dropped and were pruned."""
    count, pruned = len(output.all_seeds), sum(candidate.pruned for candidate in candidates(output))
    parts = ["1 candidate" if count == 1 else f"{count} candidates"]
    parts += [f"{len(output.dropped)} dropped"] if output.dropped else []
    return [*parts, f"{pruned} pruned"] if pruned else parts


def contact_sheet(output: BestOfNOutput, prompt: str, *, kept_only: bool = False) -> Image.Image:
    """Draw the candidates of one prompt in one picture, with their scores, the best one in a frame.

    Candidates are in their order, row by row. Small images are enlarged by a whole factor, each pixel a square; large
    ones are scaled down. A candidate that was dropped or pruned, or whose image was not kept, is an empty tile with the
    reason.

    Args:
        output: output of `BestOfN` or `rerank`; with `top_k` as large as `n` it has every image.
        prompt: title, cut after three lines; characters that cannot be printed are left out.
        kept_only: whether to leave out the empty tiles.

    Returns:
        RGB picture, at most 1500 px wide for up to 25 candidates; more are as square a grid of 238 px per column.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import create_reward, rerank
        >>> from aigiqa_reward.report import WINNER, contact_sheet
        >>> pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
        >>> sheet = contact_sheet(rerank(pictures, "a red square", create_reward("compact")), "a red square")
        >>> sheet.mode, WINNER in {color for _, color in sheet.getcolors(maxcolors=10**6)}  # the winner's frame
        ('RGB', True)
    """
    if not output.all_seeds:
        raise ValueError("output: expected at least one candidate, got none; pass what BestOfN or rerank returned")
    if kept_only and not output.seeds:
        raise ValueError("output: expected at least one image, got none; leave out kept_only to draw why")
    shown = [candidate for candidate in candidates(output) if not kept_only or candidate.place is not None]
    columns = _columns(len(shown))
    side = min(_LARGEST, max(_SMALLEST, _WIDTH // columns))
    images = [fitted(image, side) for image in output.images]
    height = max([_SMALLEST // 2, *(image.height for image in images)])
    card = (
        max([_SMALLEST, *(image.width for image in images)]) + 2 * PADDING,
        height + 2 * PADDING + 32 + 18 * (2 if output.all_correspondence is None else 3),
    )
    width = 2 * _MARGIN + columns * (card[0] + _GAP) - _GAP
    title = wrapped(printable(prompt), font(_TITLE, bold=True), width - 2 * _MARGIN, _TITLE_LINES)
    top = _MARGIN + 32 * len(title) + 40
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (width, top + rows * (card[1] + _GAP) - _GAP + _MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, text in enumerate(title):
        draw.text((_MARGIN, _MARGIN + 20 + 32 * line), text, INK, font(_TITLE, bold=True), anchor="ls")
    facts = summary(output)
    if output.seeds:
        facts += [f"the best has seed {output.seeds[0]}", "bold: total, higher is better"]
    draw.text((_MARGIN, top - 26), "  ·  ".join(facts), MUTED, font(_TEXT), anchor="ls")
    for place, candidate in enumerate(shown):
        left, upper = _MARGIN + place % columns * (card[0] + _GAP), top + place // columns * (card[1] + _GAP)
        image = None if candidate.place is None else images[candidate.place]
        _draw_candidate(sheet, candidate, image, (left, upper, left + card[0], upper + card[1]), height)
    return sheet


def _draw_candidate(sheet: Image.Image, candidate: Candidate, image: Image.Image | None, box: Box, height: int) -> None:
    best = candidate.place == 0
    note = (candidate.outcome or "the image was not kept") if image is None else ""
    draw_card(sheet, box, image, height, note, framed=best)
    draw = ImageDraw.Draw(sheet)
    baseline = box[1] + PADDING + height + 28
    state = "pruned" if candidate.pruned else "dropped"
    heading, ink = (state, MUTED) if math.isnan(candidate.total) else (number(candidate.total), INK)
    draw.text((box[0] + PADDING, baseline), heading, ink, font(_HEADING, bold=True), anchor="ls")
    if best:
        right = box[2] - PADDING
        draw.rectangle((right - 44, baseline - 17, right - 1, baseline + 4), WINNER)
        draw.text((right - 22, baseline - 6), "best", CARD, font(_SMALL, bold=True), anchor="mm")
    lines = [("quality", number(candidate.quality)), ("seed", str(candidate.seed))]
    if candidate.correspondence is not None:
        lines.insert(1, ("correspondence", number(candidate.correspondence)))
    for line, (name, value) in enumerate(lines):
        draw_row(draw, box, baseline + 22 + 18 * line, name, value, size=_SMALL)


def _columns(count: int) -> int:
    """Return columns for a grid as square as possible, or one more if that leaves fewer empty places."""
    least = math.ceil(math.sqrt(count))
    return min(least, least + 1, key=lambda columns: -count % columns)

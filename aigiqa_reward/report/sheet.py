"""Contact sheets: all candidates of one prompt, with their scores, in one picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from aigiqa_reward.report.lettering import font, number, printable, wrapped
from aigiqa_reward.report.page import state_of
from aigiqa_reward.sampling.candidates import BestOfNOutput

WINNER = (234, 88, 12)
"""Color of the frame around the winner and of nothing else in a contact sheet, sRGB."""

_SHEET, _CARD, _EMPTY = (242, 243, 245), (255, 255, 255), (232, 234, 237)
_INK, _MUTED = (24, 24, 27), (104, 106, 115)
_MARGIN, _GAP, _PADDING, _FRAME = 36, 22, 12, 6  # px: around the sheet, between cards, in a card, the winner's frame
_TITLE, _HEADING, _TEXT, _SMALL = 24, 18, 14, 12  # font sizes in px
_WIDTH = 1152
"""Width in px that the images of a row share: chosen here, for a sheet that fits a laptop's screen."""

_SMALLEST, _LARGEST = 192, 512
"""Limits in px to an image's longer side: the first leaves room for the numbers below it."""

_TITLE_LINES = 3


@dataclass(frozen=True, kw_only=True)
class _Card:
    """What is drawn of one candidate; `reason` says why there is no image, `state` why there is no total."""

    seed: int
    total: float
    quality: float
    correspondence: float | None
    image: Image.Image | None
    reason: str
    state: str
    best: bool

    def numbers(self) -> list[tuple[str, str]]:
        """The small print, line by line."""
        lines = [("quality", number(self.quality))]
        if self.correspondence is not None:
            lines.append(("correspondence", number(self.correspondence)))
        return [*lines, ("seed", str(self.seed))]


def contact_sheet(output: BestOfNOutput, prompt: str, *, kept_only: bool = False) -> Image.Image:
    """Draw the candidates of one prompt in one picture, with their scores, the best one in a frame.

    Candidates stand in their order, row by row. Small images are enlarged by a whole factor, each pixel a square; large
    ones are scaled down. A candidate that was dropped or pruned, or whose image was not kept, is an empty tile with the
    reason.

    Args:
        output: of `BestOfN` or `rerank`; with `top_k` as large as `n` it holds every image.
        prompt: the title. Shortened to three lines; characters that cannot be printed are left out.
        kept_only: leave out the empty tiles.

    Returns:
        An RGB picture, at most 1500 px wide for 25 candidates or fewer; more are as square a grid of 238 px a column.

    Raises:
        ValueError: no candidates, or none to draw.

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
    columns = _columns(len(output.seeds if kept_only else output.all_seeds))
    side = min(_LARGEST, max(_SMALLEST, _WIDTH // columns))
    cards = [card for card in _cards(output, side) if not kept_only or card.image is not None]
    images = [card.image for card in cards if card.image is not None]
    box_width = max([_SMALLEST, *(image.width for image in images)])
    box_height = max([_SMALLEST // 2, *(image.height for image in images)])
    width = box_width + 2 * _PADDING
    height = box_height + 2 * _PADDING + 32 + 18 * len(cards[0].numbers())
    sheet_width = 2 * _MARGIN + columns * width + (columns - 1) * _GAP
    title = wrapped(printable(prompt), font(_TITLE, bold=True), sheet_width - 2 * _MARGIN, _TITLE_LINES)
    top = _MARGIN + 32 * len(title) + 40
    rows = math.ceil(len(cards) / columns)
    sheet = Image.new("RGB", (sheet_width, top + rows * height + (rows - 1) * _GAP + _MARGIN), _SHEET)
    draw = ImageDraw.Draw(sheet)
    for line, text in enumerate(title):
        draw.text((_MARGIN, _MARGIN + 20 + 32 * line), text, _INK, font(_TITLE, bold=True), anchor="ls")
    draw.text((_MARGIN, top - 26), _summary(output), _MUTED, font(_TEXT), anchor="ls")
    for place, card in enumerate(cards):
        left = _MARGIN + place % columns * (width + _GAP)
        upper = top + place // columns * (height + _GAP)
        _draw_card(sheet, card, (left, upper, left + width, upper + height), box_height)
    return sheet


def _cards(output: BestOfNOutput, side: int) -> list[_Card]:
    images = dict(zip(output.seeds, output.images, strict=True))
    best = output.seeds[0] if output.seeds else None
    known = output.all_correspondence or [None] * len(output.all_seeds)
    return [
        _Card(
            seed=seed,
            total=total,
            quality=quality,
            correspondence=correspondence,
            image=_fitted(images[seed], side) if seed in images else None,
            reason=output.dropped.get(seed, state_of(output, seed) or "the image was not kept"),
            state="dropped" if seed in output.dropped else "pruned",
            best=seed == best,
        )
        for seed, total, quality, correspondence in zip(
            output.all_seeds, output.all_scores, output.all_quality, known, strict=True
        )
    ]


def _summary(output: BestOfNOutput) -> str:
    count = len(output.all_seeds)
    parts = ["1 candidate" if count == 1 else f"{count} candidates"]
    if output.dropped:
        parts.append(f"{len(output.dropped)} dropped")
    pruned = sum(math.isnan(total) for total in output.all_scores) - len(output.dropped)
    if pruned > 0:
        parts.append(f"{pruned} pruned")
    if output.seeds:
        parts += [f"the best has seed {output.seeds[0]}", "bold: total, higher is better"]
    return "  ·  ".join(parts)


def _draw_card(sheet: Image.Image, card: _Card, place: tuple[int, int, int, int], box_height: int) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top, right, bottom = place
    if card.best:
        draw.rectangle((left - _FRAME, top - _FRAME, right - 1 + _FRAME, bottom - 1 + _FRAME), WINNER)
    draw.rectangle((left, top, right - 1, bottom - 1), _CARD)
    left, top, right = left + _PADDING, top + _PADDING, right - _PADDING
    if card.image is not None:
        corner = left + (right - left - card.image.width) // 2, top + (box_height - card.image.height) // 2
        sheet.paste(card.image, corner)
    else:
        draw.rectangle((left, top, right - 1, top + box_height - 1), _EMPTY)
        lines = wrapped(printable(card.reason), font(_SMALL), right - left - 2 * _PADDING, 4)
        middle = (left + right) / 2, top + box_height / 2
        draw.multiline_text(middle, "\n".join(lines), _MUTED, font(_SMALL), anchor="mm", align="center", spacing=6)
    baseline = top + box_height + 28
    heading, ink = (card.state, _MUTED) if math.isnan(card.total) else (number(card.total), _INK)
    draw.text((left, baseline), heading, ink, font(_HEADING, bold=True), anchor="ls")
    if card.best:
        draw.rectangle((right - 44, baseline - 17, right - 1, baseline + 4), WINNER)
        draw.text((right - 22, baseline - 6), "best", _CARD, font(_SMALL, bold=True), anchor="mm")
    for line, (name, value) in enumerate(card.numbers()):
        draw.text((left, baseline + 22 + 18 * line), name, _MUTED, font(_SMALL), anchor="ls")
        draw.text((right, baseline + 22 + 18 * line), value, _MUTED, font(_SMALL), anchor="rs")


def _columns(count: int) -> int:
    """As square as can be, or one column wider where that leaves fewer empty places."""
    least = math.ceil(math.sqrt(count))
    return min(least, least + 1, key=lambda columns: -count % columns)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side at most `side`, enlarged by a whole factor only."""
    scale = side / max(image.size)
    if scale >= 1:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)

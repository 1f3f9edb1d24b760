"""Grids of images with their numbers: contact sheets of the candidates of one prompt, and validations of a training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from aigiqa_reward.report._style import CARD, EMPTY, INK, MUTED, PAPER, WINNER, font, number, printable, wrapped
from aigiqa_reward.sampling.candidates import BestOfNOutput

_MARGIN, _GAP, _PADDING, _FRAME = 36, 22, 12, 6  # px around all, between cards, around an image in its card, of a frame
_TITLE, _HEADING, _TEXT, _SMALL = 24, 18, 14, 12  # font sizes in px
_LINE = 18  # px from one line of small text to the next
_BESIDE = 230  # px for the texts of the rows at the left
_WIDTH = 1152  # px that the images of a row of a contact sheet share, so that it fits a laptop's screen
_SMALLEST, _LARGEST = 192, 512  # px, limits of an image's longer side: the first leaves room for the numbers below it


@dataclass(frozen=True, kw_only=True)
class Card:
    """An image, or an empty tile, with a note over it, and below it a bold heading and rows of names and values."""

    image: Image.Image | None
    rows: Sequence[tuple[str, str]]
    heading: str = ""
    note: str = ""
    framed: bool = False


def draw_grid(
    cards: Sequence[Card],
    columns: int,
    *,
    title: str,
    facts: Sequence[str],
    side: int,
    headings: Sequence[str] = (),
    prompts: Sequence[str] = (),
) -> Image.Image:
    """Draw cards row by row, images at most `side` px large, with headings above columns and prompts beside rows."""
    images = [card.image and fitted(card.image, side) for card in cards]
    least = min(side, _SMALLEST)
    width, height = (
        max([least, *(image.width for image in images if image)]),
        max([least // 2, *(image.height for image in images if image)]),
    )
    below = (32 if any(card.heading for card in cards) else 10) + _LINE * max(len(card.rows) for card in cards)
    step_x, step_y = width + 2 * _PADDING + _GAP, height + 2 * _PADDING + below + _GAP
    start = _MARGIN + (_BESIDE + _GAP if prompts else 0)
    total = start + columns * step_x - _GAP + _MARGIN
    titles = wrapped(printable(title), font(_TITLE, bold=True), total - 2 * _MARGIN, 3)
    notes = wrapped("  ·  ".join(facts), font(_TEXT), total - 2 * _MARGIN, 3)
    top = _MARGIN + 32 * len(titles) + _LINE * len(notes) + (44 if headings else 22)
    sheet = Image.new("RGB", (total, top + math.ceil(len(cards) / columns) * step_y - _GAP + _MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, text in enumerate(titles):
        draw.text((_MARGIN, _MARGIN + 20 + 32 * line), text, INK, font(_TITLE, bold=True), anchor="ls")
    for line, text in enumerate(notes):
        draw.text((_MARGIN, _MARGIN + 14 + 32 * len(titles) + _LINE * line), text, MUTED, font(_TEXT), anchor="ls")
    for column, text in enumerate(headings):
        ink = WINNER if cards[column].framed else INK
        middle = start + column * step_x + width // 2 + _PADDING
        draw.text((middle, top - 14), text, ink, font(_TEXT, bold=True), anchor="ms")
    for row, prompt in enumerate(prompts):
        lines = wrapped(printable(prompt), font(_TEXT), _BESIDE, min(8, (step_y - _GAP - _PADDING) // (_LINE + 2)))
        for line, text in enumerate(lines):
            corner = _MARGIN, top + row * step_y + _PADDING + 14 + (_LINE + 2) * line
            draw.text(corner, text, INK, font(_TEXT), anchor="ls")
    for place, (card, image) in enumerate(zip(cards, images, strict=True)):
        corner = start + place % columns * step_x, top + place // columns * step_y
        _draw_card(sheet, card, image, corner, (width, height), below)
    return sheet


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Scale an image so that its longer side is at most `side` px; enlarge it by a whole factor only, in squares."""
    scale = side / max(image.size)
    if scale >= 1:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _draw_card(
    sheet: Image.Image, card: Card, image: Image.Image | None, corner: tuple[int, int], box: tuple[int, int], below: int
) -> None:
    draw = ImageDraw.Draw(sheet)
    (left, top), (width, height) = corner, box
    right, bottom = left + width + 2 * _PADDING - 1, top + height + 2 * _PADDING + below - 1
    if card.framed:
        draw.rectangle((left - _FRAME, top - _FRAME, right + _FRAME, bottom + _FRAME), WINNER)
    draw.rectangle((left, top, right, bottom), CARD)
    left, top, right = left + _PADDING, top + _PADDING, left + _PADDING + width
    if image is None:
        draw.rectangle((left, top, right - 1, top + height - 1), EMPTY)
    else:
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    if lines := wrapped(printable(card.note), font(_SMALL), width - 2 * _PADDING, 4):
        middle, ink = (left + width / 2, top + height / 2), MUTED if image is None else CARD
        draw.multiline_text(middle, "\n".join(lines), ink, font(_SMALL), anchor="mm", align="center", spacing=6)
    baseline = top + height + (28 if card.heading else 20)
    if card.heading:
        ink = MUTED if card.heading.isalpha() else INK  # "dropped", or a number
        draw.text((left, baseline), card.heading, ink, font(_HEADING, bold=True), anchor="ls")
        if card.framed:
            draw.rectangle((right - 44, baseline - 17, right - 1, baseline + 4), WINNER)
            draw.text((right - 22, baseline - 6), "best", CARD, font(_SMALL, bold=True), anchor="mm")
        baseline += 22
    for line, (name, value) in enumerate(card.rows):
        draw.text((left, baseline + _LINE * line), name, MUTED, font(_SMALL), anchor="ls")
        draw.text((right, baseline + _LINE * line), value, INK, font(_SMALL), anchor="rs")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row of a BestOfNOutput; `outcome` is why it has no image or no place among the winners."""

    seed: int
    total: float
    quality: float | None
    correspondence: float | None
    place: int | None
    outcome: str


def candidates(output: BestOfNOutput) -> Iterator[Candidate]:
    """Iterate over all candidates in candidate order; `place` is 0 for the winner, None for those that are not kept."""
    places = {number: place for place, number in enumerate(output.winners)}
    for seed, total, quality, correspondence in output.all_rows():
        outcome = output.dropped.get(seed, "")
        if seed not in output.dropped and math.isnan(total):
            last = output.previews.get(seed, ())[-1:]
            outcome = f"pruned after {last[0].step} of {last[0].steps} steps" if last else "pruned"
        scores = {"total": total, "quality": quality, "correspondence": correspondence}
        yield Candidate(seed=seed, place=places.get(seed), outcome=outcome, **scores)


def number_word(output: BestOfNOutput) -> str:
    """Return what a candidate's number is: a seed that makes its image again, or a number alone."""
    return "candidate" if None in output.seeds else "seed"


def summary(output: BestOfNOutput, word: str = "candidate") -> list[str]:
    """Return how many candidates there are, were dropped and were pruned; `word` is what they are called."""
    count, dropped = len(output.all_seeds), len(output.dropped)
    pruned = sum(math.isnan(total) for total in output.all_scores) - dropped
    parts = [f"1 {word}" if count == 1 else f"{count} {word}s"]
    return parts + [f"{many} {what}" for many, what in ((dropped, "dropped"), (pruned, "pruned")) if many]


def contact_sheet(output: BestOfNOutput, prompt: str, *, kept_only: bool = False) -> Image.Image:
    """Draw the candidates of one prompt in one picture, with their scores, the best one in a frame.

    Candidates are in their order, row by row. Small images are enlarged by a whole factor, each pixel a square; large
    ones are scaled down. A candidate that was dropped or pruned, or whose image was not kept, is an empty tile with the
    reason.

    Args:
        output: output of `BestOfN` or `rerank`; with `keep="thumbnails"` or `top_k=n` it has every image.
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
    least = math.ceil(math.sqrt(len(shown)))  # columns: as square as possible, or one more for fewer empty places
    columns = min(least, least + 1, key=lambda columns: -len(shown) % columns)
    facts = summary(output)
    if output.seeds:
        facts += [f"the best: {number_word(output)} {output.winners[0]}", "bold: total, higher is better"]
    side = min(_LARGEST, max(_SMALLEST, _WIDTH // columns))
    return draw_grid([_card(output, c) for c in shown], columns, title=prompt, facts=facts, side=side)


def _card(output: BestOfNOutput, candidate: Candidate) -> Card:
    state = "dropped" if candidate.seed in output.dropped else "pruned"
    aspects = {"quality": candidate.quality, "correspondence": candidate.correspondence}
    rows = [(name, number(value)) for name, value in aspects.items() if value is not None]
    rows.append((number_word(output), str(candidate.seed)))
    image = output.others.get(candidate.seed) if candidate.place is None else output.images[candidate.place]
    return Card(
        image=image,
        rows=rows,
        heading=state if math.isnan(candidate.total) else number(candidate.total),
        note="" if image is not None else candidate.outcome or "the image was not kept",
        framed=candidate.place == 0,
    )

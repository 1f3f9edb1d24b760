import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aigiqa_reward import BestOfNOutput
from aigiqa_reward.report import WINNER, contact_sheet

PROMPT = "a red apple on a blue background"

Box = tuple[int, int, int, int]


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def output(
    images: list[Image.Image], scores: Any = None, *, dropped: dict[int, str] | None = None, top_k: int | None = None
) -> BestOfNOutput:
    seeds = list(range(len(images)))
    reasons = dropped or {}
    given = scores or [place / 100 for place in range(len(images))]
    total = [math.nan if seed in reasons else score for seed, score in zip(seeds, given, strict=True)]
    order = [place for place in range(len(images)) if seeds[place] not in reasons]
    order = sorted(order, key=lambda place: -total[place])[:top_k]
    best, names = [total[place] for place in order], ("scores", "quality", "correspondence")
    columns = dict.fromkeys(names, best) | dict.fromkeys((f"all_{name}" for name in names), total)
    kept = [images[place] for place in order]
    return BestOfNOutput(images=kept, seeds=[*order], winners=order, all_seeds=seeds, dropped=reasons, **columns)


def pixels(result: BestOfNOutput, prompt: str = PROMPT) -> np.ndarray:
    sheet = contact_sheet(result, prompt)
    assert sheet.mode == "RGB"
    return np.asarray(sheet)


def find(sheet: np.ndarray, image: Image.Image) -> tuple[Box, int] | None:
    small = np.asarray(image)
    corners = np.nonzero((sheet @ [1, 256, 65536]) == small[0, 0] @ [1, 256, 65536])
    for top, left in zip(*map(np.ndarray.tolist, corners), strict=True):
        for factor in range(12, 0, -1):
            bottom, right = top + factor * small.shape[0], left + factor * small.shape[1]
            large = small.repeat(factor, axis=0).repeat(factor, axis=1)
            if np.array_equal(sheet[top:bottom, left:right], large):
                return (left, top, right, bottom), factor
    return None


def difference(a: np.ndarray, b: np.ndarray) -> Box | None:
    return box_where((a != b).any(axis=2))


def boxes_of(sheet: np.ndarray, images: list[Image.Image]) -> list[Box]:
    found = [find(sheet, image) for image in images]
    assert None not in found
    assert len({factor for _, factor in found}) == 1
    return [box for box, _ in found]


def box_where(mask: np.ndarray) -> Box | None:
    rows, columns = np.nonzero(mask)
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None


def below(box: Box | None, image: Box) -> bool:
    assert box is not None
    return image[0] - 1 <= box[0] and box[2] <= image[2] + 1 and image[3] < box[1] and box[3] < image[3] + 110


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (7, 4), pytest.param(64, 8, marks=pytest.mark.slow)])
def test_every_image_is_enlarged_and_is_in_candidate_order(count: int, columns: int) -> None:
    images = [noise(seed) for seed in range(count)]
    sheet = pixels(output(images))
    boxes = boxes_of(sheet, images)
    assert boxes[0][2] - boxes[0][0] >= 3 * 64
    lefts = sorted({box[0] for box in boxes})
    tops = sorted({box[1] for box in boxes})
    assert (len(lefts), len(tops)) == (columns, math.ceil(count / columns))
    assert [(box[0], box[1]) for box in boxes] == [(x, y) for y in tops for x in lefts][:count]
    assert lefts[0] == sheet.shape[1] - max(box[2] for box in boxes), "margins left and right"


@pytest.mark.parametrize("size", [(1024, 512), (16, 16), (300, 40)])
def test_images_of_every_size_keep_their_shape(size: tuple[int, int]) -> None:
    color = (0, 77, 255)
    sheet = pixels(output([Image.new("RGB", size, color)] * 4, [0.4, 0.3, 0.2, 0.1]))
    assert sheet.shape[1] < 1400
    width = sheet.shape[1] // 2
    box = box_where((sheet[:, :width] == color).all(axis=2)[: sheet.shape[0] // 2])
    assert box is not None
    assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(size[0] / size[1], rel=0.03)
    assert 192 <= max(box[2] - box[0], box[3] - box[1]) <= 512


@pytest.mark.parametrize(("count", "winner"), [(1, 0), (7, 3)])
def test_the_frame_surrounds_the_winner_and_no_other(count: int, winner: int) -> None:
    images = [noise(seed) for seed in range(count)]
    sheet = pixels(output(images, [0.9 if place == winner else 0.5 for place in range(count)]))
    boxes = boxes_of(sheet, images)
    framed = (sheet == WINNER).all(axis=2)
    left, top, right, bottom = frame = box_where(framed)
    edge = framed[top:bottom, left:right].copy()
    edge[4:-4, 4:-4] = True
    assert frame is not None and edge.all()
    for place, (x0, y0, x1, y1) in enumerate(boxes):
        inside = left < x0 and x1 < right and top < y0 and y1 < bottom
        outside = x1 < left or right < x0 or y1 < top or bottom < y0
        assert (inside, outside) == ((True, False) if place == winner else (False, True))
    assert framed[boxes[winner][3] + 1 : bottom - 8, left + 8 : right - 8].any(), "a label beside the frame"
    nobody = pixels(output(images, dropped=dict.fromkeys(range(count), "NaN or infinite pixels")))
    assert not (nobody == WINNER).all(axis=2).any()


@pytest.mark.parametrize("field", ["all_scores", "all_quality", "all_correspondence", "all_seeds"])
def test_each_number_is_below_its_own_image(field: str) -> None:
    images = [noise(seed) for seed in range(7)]
    result = output(images)
    changed = list(getattr(result, field))
    changed[5] = -123456.789e30
    changes: dict[str, Any] = {field: changed}
    if field == "all_seeds":
        changes["winners"] = [changed[number] for number in result.winners]
    before, after = pixels(result), pixels(dataclasses.replace(result, **changes))
    assert below(difference(before, after), boxes_of(before, images)[5])


def test_a_dropped_candidate_is_an_empty_tile_with_the_reason() -> None:
    images = [noise(seed) for seed in range(7)]
    place = boxes_of(pixels(output(images)), images)[3]

    def tile(reason: str) -> np.ndarray:
        sheet = pixels(output(images, dropped={3: reason}))
        assert find(sheet, images[3]) is None
        assert boxes_of(sheet, [*images[:3], *images[4:]])
        return sheet[place[1] : place[3], place[0] : place[2]]

    assert find(pixels(output(images, top_k=1)), images[3]) is None, "nor is an image that was not kept"
    nothing = tile("\n")
    assert (nothing == nothing[0, 0]).all()
    for reason in ("NaN or infinite pixels", "x" * 500, "\n\x1b\x00 漢字"):
        written = difference(nothing, tile(reason))
        assert written is not None
        x0, y0, x1, y1 = written
        assert 0 < x0 < x1 < nothing.shape[1]
        assert 0 < y0 < y1 < nothing.shape[0]


@pytest.mark.parametrize("prompt", ["", "a" * 5000, "漢字" * 500, "$\\frac{1}{$", "\x1b[31m\x00\udcff" * 300])
def test_hostile_prompts_leave_the_sheet_as_it_is(prompt: str, capfd: pytest.CaptureFixture[str]) -> None:
    images = [noise(seed) for seed in range(4)]
    usual = pixels(output(images))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sheet = pixels(output(images), prompt)
    assert capfd.readouterr() == ("", "")
    down = sheet.shape[0] - usual.shape[0]
    assert -64 <= down <= 128, "no more than a few lines"
    assert boxes_of(sheet, images) == [(x0, y0 + down, x1, y1 + down) for x0, y0, x1, y1 in boxes_of(usual, images)]
    margin = boxes_of(sheet, images)[0][0] // 2
    assert (sheet[:, :margin] == sheet[0, 0]).all(), "nothing runs over the edge"
    assert (sheet[:, -margin:] == sheet[0, 0]).all()
    assert np.array_equal(pixels(output(images), "a\x00 \x1bb\n\r\t c\u2028"), pixels(output(images), "a b c"))


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="output: expected at least one candidate"):
        contact_sheet(dataclasses.replace(output([]), all_correspondence=None, correspondence=None), PROMPT)
    with pytest.raises(ValueError, match="output: expected at least one image"):
        contact_sheet(output([noise(0)], dropped={0: "NaN"}), PROMPT, kept_only=True)

"""Pictures of validations and of whole trainings hold what they were drawn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from validated import made_up

from aigiqa_reward.finetuning.reporting import draw_course, draw_curves, draw_over_time, draw_validation, drawn_of
from aigiqa_reward.finetuning.results import ValidationResult
from aigiqa_reward.report.curves import _smoothed, limits


def painted(step: int) -> ValidationResult:
    random = np.random.default_rng(step)
    scores = random.normal(size=(2, 3))
    tiles = random.integers(0, 256, size=(2, 3, 64, 64, 3), dtype=np.uint8)
    return replace(made_up(step, scores, scores), tiles=tiles)


def test_pictures_hold_the_images(tmp_path: Path) -> None:
    result = painted(7)
    picture = np.asarray(Image.open(draw_validation(result, tmp_path / "one.png")))
    large = result.tiles[1, 2].repeat(3, axis=0).repeat(3, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(picture, (4, 4, 3))[:, :, 0]
    corners = np.argwhere((windows == large[:4, :4]).all(axis=(2, 3, 4)))
    assert any(np.array_equal(picture[y : y + 192, x : x + 192], large) for y, x in corners)
    late = ValidationResult(**{**vars(result), "step": 20})
    framed = np.asarray(Image.open(draw_over_time([result, late], 20, tmp_path / "two.png")))
    plain = np.asarray(Image.open(draw_over_time([result, late], None, tmp_path / "three.png")))
    orange = np.array([234, 88, 12])
    assert (framed == orange).all(axis=2).any()
    assert not (plain == orange).all(axis=2).any()
    with pytest.raises(ValueError, match="results: expected at least one"):
        draw_over_time([], None, tmp_path / "none.png")


@pytest.mark.parametrize("kept", [0, 7, 99, None])
def test_of_many_steps_the_first_the_last_and_the_kept_are_drawn(kept: int | None) -> None:
    places = drawn_of(range(100), kept)
    assert len(places) == 10
    assert places == sorted(set(places))
    assert {0, 99} | ({kept} if kept is not None else set()) <= set(places)


def test_curves_mark_the_kept_step_and_take_what_there_is(tmp_path: Path) -> None:
    steps = [{"step": i, "seconds": 2.0 * i, "loss": 1.0, "reward": 0.1 * i, "kl": None} for i in range(1, 9)]
    summary = made_up(0, [[1.0]], [[2.0]]).summary()
    validations = [{"step": i, "seconds": 2.0 * i, "validation": summary} for i in (0, 8)]
    sizes, pixels = {}, {}
    for name, history, kept in (
        ("all", steps + validations, None),
        ("kept", steps + validations, 8),
        ("few", steps, 4),
    ):
        picture = Image.open(draw_curves(history, kept, tmp_path / f"{name}.png")).convert("RGB")
        sizes[name], pixels[name] = picture.size, np.asarray(picture)
    assert sizes["all"][0] == 1280
    assert sizes["few"][1] < sizes["all"][1] == sizes["kept"][1]
    assert not np.array_equal(pixels["all"], pixels["kept"])
    slow = [line | {"validation": summary | {"seconds": 9.0}} for line in validations]  # their own time is no place
    again = Image.open(draw_curves(steps + slow, 8, tmp_path / "slow.png")).convert("RGB")
    assert np.array_equal(np.asarray(again), pixels["kept"])
    with pytest.raises(ValueError, match="history: expected lines"):
        draw_curves([{"step": 1, "seconds": 1.0, "loss": 2.0}], None, tmp_path / "none.png")


@pytest.mark.parametrize("batches", [200, 0])
def test_axes_do_not_stretch_noise_into_a_climb(batches: int) -> None:
    random = np.random.default_rng(0)
    steps = np.arange(float(batches or 9))
    for climb, least, most in ((0.0, 0.0, 0.6), (1.0, 0.5, 0.9)):
        values = 0.5 + 0.02 * random.normal(size=len(steps)) + climb * steps / len(steps)
        points = np.column_stack([steps, steps, values])
        drawn = [_smoothed(points), points[:0]] if batches else [points[:0], points]
        low, high = limits(points[: len(points) if batches else 0], *drawn)
        shown = np.concatenate(drawn)[:, 2]
        assert least <= (shown.max() - shown.min()) / (high - low) <= most


def test_the_course_of_a_training_is_drawn_from_its_folder(tmp_path: Path) -> None:
    history = []
    for step in (0, 10, 20):
        result = painted(step)
        result.write(tmp_path / "validation")
        history.append({"step": step, "seconds": float(step), "validation": result.summary()})
    (tmp_path / "validation" / "step-000010.json").unlink()
    drawn = draw_course(tmp_path, history, 20)
    assert drawn == [tmp_path / "validation.png", tmp_path / "curves.png"]
    expected = draw_over_time([painted(0), painted(20)], 20, tmp_path / "expected.png")
    assert (tmp_path / "validation.png").read_bytes() == expected.read_bytes()
    assert draw_course(tmp_path / "none", [], None) == []


@pytest.mark.parametrize(("prompts", "seeds"), [(1, 1), (8, 4)])
def test_any_texts_and_sizes_are_drawn(prompts: int, seeds: int, tmp_path: Path) -> None:
    scores = np.full((prompts, seeds), np.nan)
    for height, width in ((16, 250), (256, 40), (64, 64)):
        tiles = np.zeros((prompts, seeds, height, width, 3), dtype=np.uint8)
        texts = (*("word " * 500, "\x00\n$\\frac{", "x" * 999, "猫")[:prompts], *["a cat"] * (prompts - 4))
        result = replace(made_up(3, scores, scores, diversity=np.nan, bad=1), prompts=texts, tiles=tiles)
        picture = Image.open(draw_validation(result, tmp_path / "drawn.png"))
        assert picture.width < 1300

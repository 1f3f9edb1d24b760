import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from aigiqa_reward.evaluation import ProtocolReport, SplitScores
from aigiqa_reward.report import protocol_plot, scatter_plot

BLUE, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)
WORDS = {"title": "a benchmark: a model", "x_label": "prediction", "y_label": "mean opinion score"}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def points(picture: np.ndarray) -> np.ndarray:
    blue = picture[:, :, 2] - picture[:, :, 0] > 60
    found, count = ndimage.label(ndimage.binary_closing(blue, iterations=3))  # a line may run over a dot
    return np.array(ndimage.center_of_mass(found > 0, found, range(1, count + 1))).reshape(-1, 2)[:, ::-1]


def two_bands(count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(count, dtype=float), np.tile([-1.0, 1.0], count // 2)


def scatter(path: Path, *args: Any, **words: Any) -> np.ndarray:
    assert scatter_plot(*args, path, **{**WORDS, **words}) == path
    return pixels(path)


def test_every_point_is_in_its_place(tmp_path: Path) -> None:
    x, y = two_bands()
    y = y + 0.1 * np.sin(x)
    picture = scatter(tmp_path / "plot.png", x, y)
    assert picture.shape == (960, 1280, 3)
    found = points(picture)
    assert len(found) == 30
    found = found[np.argsort(found[:, 0])]
    for pixel, value, slope in ((found[:, 0], x, 1), (found[:, 1], y, -1)):
        line = np.polyfit(value, pixel, 1)
        assert np.sign(line[0]) == slope
        assert np.abs(np.polyval(line, value) - pixel).max() < 1
    assert (picture[:4] == 255).all()
    assert (picture[:, -4:] == 255).all()


def test_generators_have_colors_and_a_legend_from_high_to_low(tmp_path: Path) -> None:
    x, y = two_bands()
    picture = scatter(tmp_path / "plot.png", x, y, generators=["worse", "better"] * 15)
    heights = []
    for color in (BLUE, ORANGE):
        rows, columns = np.nonzero((picture == color).all(axis=2))
        assert columns.min() > 900, "only the legend is opaque"
        heights.append(rows.mean())
    assert heights[0] < heights[1]
    upper, lower = picture[: 960 // 2, :900], picture[960 // 2 :, :900]
    blueish, reddish = (lambda p: p[:, :, 2] - p[:, :, 0] > 60), (lambda p: p[:, :, 0] - p[:, :, 2] > 60)
    assert blueish(upper).any() and reddish(lower).any(), "better is above, and blue"
    assert not blueish(lower).any() and not reddish(upper).any()


def test_words_are_drawn_as_they_are(tmp_path: Path) -> None:
    x, y = two_bands()
    before = scatter(tmp_path / "a.png", x, y)
    for words in ({"title": "cost in $: \\frac{1}{$"}, {"x_label": "$x$ and $"}, {"y_label": "^_{"}):
        changed = np.nonzero((scatter(tmp_path / "b.png", x, y, **words) != before).any(axis=2))
        assert len(changed[0])
        if "title" in words:
            assert changed[0].max() < 60
        if "x_label" in words:
            assert changed[0].min() > 900
        if "y_label" in words:
            assert changed[1].max() < 60
    names = np.repeat([f"_generator with a long name {i}, $x_{i}$" for i in range(60)], 3)
    for text, given in (("W" * 500, None), ("\n" * 9, None), ("many", names)):
        data = (x, y) if given is None else np.random.default_rng(0).normal(size=(2, 180))
        long = scatter(tmp_path / "long.png", *data, title=text, x_label=text, y_label=text, generators=given)
        for edge in (long[:3], long[-3:], long[:, :3], long[:, -3:]):
            assert (edge == 255).all()
    for data in ((np.full(20, 0.3), np.arange(20.0)), (1e-9 * np.arange(20.0) + 1, 1e9 * np.arange(20.0))):
        assert len(points(scatter(tmp_path / "extreme.png", *data))) >= 1


@pytest.mark.parametrize("free", [(1, -1), None])
def test_the_figures_hide_no_point(tmp_path: Path, free: tuple[int, int] | None) -> None:
    across, up = (grid.ravel() for grid in np.meshgrid(np.linspace(-1, 1, 16), np.linspace(-1, 1, 16)))
    rows = np.full(len(up), True) if free is None else (across * free[0] < 0) | (up * free[1] < 0.4)
    rows &= np.abs(up) > 0.3  # room for the line
    assert len(points(scatter(tmp_path / "plot.png", across[rows], up[rows]))) == rows.sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generators": ["a"]}, "generators: expected 30 names"),
        ({"path": "plot.jpg"}, r"path: expected a name that ends in \.png"),
        ({"predicted": np.full(30, np.nan)}, "predicted: expected finite numbers"),
    ],
)
def test_malformed_input_is_refused_and_nothing_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given = {"predicted": two_bands()[0], "target": two_bands()[1], "path": "plot.png", **WORDS, **changes}
    with pytest.raises(ValueError, match=message):
        scatter_plot(**{**given, "path": tmp_path / given["path"]})
    assert list(tmp_path.iterdir()) == []


def scores(task: str, predictor: str, values: list[float], first_seed: int = 0) -> list[SplitScores]:
    names = ["krcc", "plcc", "plcc_fitted", "rmse", "centered_srcc", "gain", "gain_within", "right_prompt_auc"]
    rest = {**dict.fromkeys(names, math.nan), "predictor": predictor, "task": task, "images": 40}
    return [SplitScores(seed=seed, srcc=value, **rest) for seed, value in enumerate(values, start=first_seed)]


def plotted(path: Path, *parts: list[SplitScores], **words: str) -> np.ndarray:
    names = {"title": "a benchmark", "protocol": "by prompt, 80/20", **words}
    report = ProtocolReport(**names, scores=tuple(itertools.chain(*parts)))
    assert protocol_plot(report, path) == path
    return pixels(path)


def test_every_seed_is_a_point_and_the_bar_is_their_mean(tmp_path: Path) -> None:
    model, ridge = [0.60, 0.70, 0.80, 0.94], [0.1, 0.35, 0.2, 0.15]
    both = scores("quality", "model", model), scores("quality", "ridge", ridge)
    picture = plotted(tmp_path / "plot.png", *both)
    assert picture.shape[1] == 1280
    found = points(picture)
    assert len(found) == 8
    found = found[np.argsort(found[:, 1])]  # rows from the top, in each the seeds in their order
    scale = np.polyfit([*model, *ridge], found[:, 0], 1)
    assert scale[0] > 0
    assert np.abs(np.polyval(scale, [*model, *ridge]) - found[:, 0]).max() < 1
    for values, seen in ((model, found[:4]), (ridge, found[4:])):
        top, bottom = int(seen[:, 1].min()) - 8, int(seen[:, 1].max()) + 9
        left, right = int(found[:, 0].min()) - 9, int(found[:, 0].max()) + 9
        dark = (picture[top:bottom, left:right].max(axis=2) < 60).sum(axis=0)
        bar = np.flatnonzero(dark > 0.8 * (bottom - top))
        assert left + bar.mean() == pytest.approx(np.polyval(scale, np.mean(values)), abs=1.5)


def test_panels_grow_with_tasks_and_undefined_and_single_seeds_can_be_drawn(tmp_path: Path) -> None:
    quality = [scores("quality", f"control {i}, with a rather long name for a row", [0.2 * i, 0.1]) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = plotted(tmp_path / "one.png", *quality)
        two = plotted(tmp_path / "two.png", *quality, scores("correspondence", "model", [0.5]))
        flat = plotted(tmp_path / "flat.png", scores("quality", "flat", [math.nan, math.nan]))
        partly = plotted(
            tmp_path / "partly.png",
            scores("quality", "model", [0.7, 0.6, 0.8]),
            scores("quality", "ridge", [0.5, math.nan], first_seed=1),
            title="$\\frac{1}{$",
            protocol="by $prompt$ " * 100,
        )
    assert one.shape[0] < two.shape[0]
    assert [len(points(picture)) for picture in (one, two, flat, partly)] == [8, 9, 0, 4]
    assert (two[:, -4:] == 255).all() and (two[:, :4] == 255).all()
    with pytest.raises(ValueError, match="report: expected the scores of one seed at least"):
        plotted(tmp_path / "none.png", [])


@pytest.mark.slow
def test_contact_sheets_load_no_matplotlib_and_plots_no_pyplot(tmp_path: Path) -> None:
    draw = f"p(range(9), range(9), {str(tmp_path / 'a.png')!r}, title='', x_label='', y_label='')"
    for code, absent in (("contact_sheet", "matplotlib"), (f"scatter_plot as p\n{draw}", "matplotlib.pyplot")):
        code = f"import sys\nfrom aigiqa_reward.report import {code}\nprint({absent!r} in sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout == "False\n"

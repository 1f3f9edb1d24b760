import base64
import io
import re
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import noise, output

from aigiqa_reward import BestOfNOutput
from aigiqa_reward.report import write_page
from aigiqa_reward.sampling.candidates import Preview

HOSTILE = "<img src=x onerror=alert(1)>\"'& </style></title><script>alert(2)</script>"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and kind in [*(a.get("class") or "").split(), ""]]

    def text_in(self, tag: str) -> list[str]:
        return [data for inside, data in self.texts if inside == tag]


def written(tmp_path: Path, outputs: list[tuple[str, BestOfNOutput]], **more: Any) -> tuple[str, Page]:
    text = write_page(outputs, tmp_path / "page.html", **more).read_text(encoding="utf-8")
    return text, Page(text)


def searched() -> BestOfNOutput:
    result = output([noise(seed) for seed in range(4)], [0.1, 0.2, 0.3, 0.4], dropped={0: HOSTILE}, top_k=2)
    result.all_scores[1] = float("nan")
    previews = {
        seed: tuple(Preview(step=step, steps=8, total=0.01 * seed + 0.1 * step, quality=0.5) for step in steps)
        for seed, steps in {1: (2,), 2: (2, 4), 3: (2, 4)}.items()
    }
    return BestOfNOutput(**{**vars(result), "previews": previews, "denoiser_calls": 20})


def pixels_of(attributes: dict[str, str | None]) -> np.ndarray:
    source = attributes["src"] or ""
    kind, data = re.fullmatch(r"data:image/(png|webp);base64,(.*)", source).groups()  # type: ignore[union-attr]
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert image.format == kind.upper()
    return np.asarray(image)


def test_it_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    maps = [[{"noise": np.eye(4), "words": [("<b>", 0.25), ("fox", np.float32(0.75))]}]]
    text, page = written(tmp_path, [("a\x00\x1b[31m fox", searched())], maps=maps)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert '<span style="--score: 0.250" title="0.250">&lt;b&gt;</span> <span style="--score: 0.750"' in text
    assert not re.search(r"<script|javascript:|https?://|@import|url\(|<link|<iframe|<object", text, re.IGNORECASE)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all((a["src"] or "").startswith("data:image/") for a in page.all("img"))
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")
    assert "prefers-color-scheme: dark" in text
    assert any(a.get("name") == "viewport" for a in page.all("meta"))


def test_winners_show_their_pixels_scores_and_seeds(tmp_path: Path) -> None:
    result = searched()
    _, page = written(tmp_path, [("a", result), ("b", result)])
    images = page.all("img")
    assert len(images) == 4
    for attributes, image, seed in zip(images, result.images * 2, result.seeds * 2, strict=True):
        assert np.array_equal(pixels_of(attributes), np.asarray(image))
        assert f"seed {seed}" in (attributes["alt"] or "")
    numbers = page.text_in("dd")
    assert numbers == ["0.400", "0.400", "0.400", "0.300", "0.300", "0.300"] * 2
    assert [a["id"] for a in page.all("h2")] == ["prompt-0", "prompt-1"]
    assert len(page.all("figure", "best")) == 2


def test_large_images_are_made_smaller_and_nothing_ranked_is_said(tmp_path: Path) -> None:
    large = Image.fromarray(np.full((1500, 1000, 3), (200, 30, 30), dtype=np.uint8))
    _, nobody = written(tmp_path, [("a", output([large], dropped={0: "NaN"}))])
    assert any("No candidate" in text for text in nobody.text_in("p"))
    _, page = written(tmp_path, [("a", output([large]))])
    (attributes,) = page.all("img")
    shown = pixels_of(attributes)
    assert shown.shape == (768, 512, 3)
    assert np.abs(shown.astype(int) - (200, 30, 30)).max() < 8
    assert (attributes["width"], attributes["height"]) == ("1000", "1500")


def test_the_table_lists_the_outcome_of_every_candidate(tmp_path: Path) -> None:
    _, page = written(tmp_path, [("a", searched())])
    cells = page.text_in("td")
    assert [cells.count(text) for text in ("pruned after 2 of 8 steps", "winner 1", "winner 2", HOSTILE)] == [1] * 4
    assert (len(page.all("tr")), len(page.all("tr", "best"))) == (5, 2)
    assert any("1 dropped" in t and "1 pruned" in t and "20 denoiser calls" in t for t in page.text_in("p"))


def test_a_curve_for_each_candidate_that_was_looked_at(tmp_path: Path) -> None:
    _, page = written(tmp_path, [("a", searched())])
    lines = [[tuple(map(float, p.split(","))) for p in (a["points"] or "").split()] for a in page.all("polyline")]
    assert [len(line) for line in lines] == [1, 3, 3]
    assert (len(page.all("g", "curve")), len(page.all("g", "best"))) == (3, 2)
    for line in lines[1:]:
        assert [x for x, _ in line] == sorted(x for x, _ in line)
    by_total = {0.21: lines[0][0], 0.22: lines[1][0], 0.23: lines[2][0], 0.42: lines[1][1], 0.3: lines[1][2]}
    heights = [by_total[total][1] for total in sorted(by_total)]
    assert heights == sorted(heights, reverse=True), "a higher reward is drawn higher"
    slope = (by_total[0.42][1] - by_total[0.22][1]) / 0.2
    assert by_total[0.3][1] == pytest.approx(by_total[0.22][1] + slope * 0.08, abs=0.2)


def test_many_prompts_take_no_more_memory_than_few(tmp_path: Path) -> None:
    def peak(count: int) -> tuple[int, int]:
        outputs = ((f"prompt {i}", output([noise(i, (160, 160))])) for i in range(count))
        tracemalloc.start()
        file = write_page(outputs, tmp_path / "page.html")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, file.stat().st_size

    (few, _), (many, size) = peak(3), peak(30)
    assert many < few + size / 10, "the text of those before is not kept"


def test_heat_maps_are_drawn_beside_their_winner(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 12).reshape(3, 4)
    maps = [[{"edge_blur": ramp, "flat": np.full((2, 2), 7.0), "broken": np.array([[np.nan, np.inf]])}]]
    before, page = written(tmp_path, [("a", searched())], maps=maps)
    drawn = [a for a in page.all("img") if (a["alt"] or "").startswith("Map")]
    assert [a["alt"] for a in drawn] == ["Map: edge blur", "Map: flat", "Map: broken"]
    assert sum("bright" in text for text in page.text_in("p")) == 1
    brightness = pixels_of(drawn[0]).astype(int).sum(axis=2).ravel()
    assert pixels_of(drawn[0]).shape == (3, 4, 3)
    assert (np.diff(brightness) > 0).all()
    with pytest.raises(ValueError, match=r"maps: expected \(H, W\) for 'x', got shape \(3,\)"):
        written(tmp_path, [("b", searched()), ("c", searched())], maps=[[], [{"x": np.zeros(3)}]])
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == before, "an error leaves the page as it was"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


EVERYWHERE = (
    HOSTILE,
    "--><script>alert(1)</script><!--",
    '" onmouseover="alert(1)',
    "line\u2028separator\u2029</h2><iframe src=//x>\0\ud800\r",
    "&lt;script&gt;&#60;img src=x&#62;\u202e<marquee>",
)


@pytest.mark.parametrize("text", EVERYWHERE)
def test_no_element_or_attribute_comes_from_anyones_text(tmp_path: Path, text: str) -> None:
    def page(word: str) -> tuple[Page, str]:
        result = output([noise(seed) for seed in range(3)], dropped={0: word})
        named: Any = {1: word, 2: 2, 0: 0}  # a seed that is a text, which a caller's own search might have
        previews = {word: (Preview(step=1, steps=4, total=0.5, quality=0.5),), 2: ()}
        winners, every = ([named[seed] for seed in column] for column in (result.winners, result.all_seeds))
        result = replace(result, winners=winners, all_seeds=every, previews=previews)
        maps = [[{word: np.zeros((4, 4))}]]
        file = write_page([(word, result)], tmp_path / "p.html", title=word, notes=[word], maps=maps, remarks=[word])
        content = file.read_text(encoding="utf-8")
        return Page(content), content

    hostile, content = page(text)
    harmless, _ = page("a harmless word")

    def shape(found: Page) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, {n: v for n, v in attributes.items() if n != "alt"}) for tag, attributes in found.elements]

    assert shape(hostile) == shape(harmless)
    assert not set(content) & set("\u2028\u2029\0\r\u202e")
    if text.isprintable():
        assert all(text in "".join(hostile.text_in(tag)) for tag in ("title", "h1", "h2", "p", "td", "figcaption"))

"""The page in a real browser, headless: every tab's main path, labeling by keys, several raters, a phone.

`AIGIQA_SCREENSHOTS=FOLDER` keeps pictures of the tabs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ENVIRONMENT, command, run
from PIL import Image

from aigiqa_reward.toy.pictures import compose
from aigiqa_reward.toy.world import caption
from aigiqa_reward.web.labels import Labels, pair_of

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("gradio", reason="the page needs the extra web")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, as in Debian's package of that name"),
]

SCREENSHOTS = os.environ.get("AIGIQA_SCREENSHOTS")
EVIL = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
WAIT = 60_000
"""Milliseconds; a loaded machine is slow."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: 10 images of the emoji world with one prompt, two with markup as names and prompts, a training's run."""
    place = tmp_path_factory.mktemp("web")
    for folder in ("images", "evil", "runs/draft/validation"):
        (place / folder).mkdir(parents=True)
    batch = compose(np.array([(0, i % 8) for i in range(10)]), np.random.default_rng(0))
    for number, image in enumerate(batch):
        pixels = (image.permute(1, 2, 0).numpy() * 255).astype("uint8")
        Image.fromarray(pixels).save(place / "images" / f"{number}.png")
        (place / "images" / f"{number}.txt").write_text(caption(0, 4), encoding="utf-8")
    for number in range(2):
        name = EVIL.replace("/", "")
        shutil.copy(place / "images" / f"{number}.png", place / "evil" / f"{number}{name}.png")
        (place / "evil" / f"{number}{name}.txt").write_text(EVIL, encoding="utf-8")
    run = place / "runs" / "draft"
    lines = [{"step": step, "seconds": float(step), "reward": 0.5 + step / 100, "kl": 0.0} for step in range(1, 9)]
    (run / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    for step in (4, 8):
        shutil.copy(place / "images" / f"{step}.png", run / "validation" / f"step-{step:06d}.png")
    return place


@contextmanager
def served(place: Path, output: str, port: str = "0") -> Iterator[tuple[str, Any]]:
    """Yield the page's address and process."""
    folders = (place / name for name in ("images", "evil", "runs"))
    arguments = command("web", *folders, "--port", port, "--output-dir", place / output)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=place) as process:
        assert process.stderr is not None
        yield next(found[0] for line in process.stderr if (found := re.search(r"http://\S+(?=;)", line))), process
        process.send_signal(signal.SIGINT)
        process.stderr.read()


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    with served(place, "out") as (address, process):
        yield address
    assert process.returncode in (0, 130)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, address: str, *, width: int = 1280, tab: str = "Rank") -> Any:
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    page.foreign = []  # answers from elsewhere
    page.on("response", lambda answer: page.foreign.append(answer.url) if not _own(answer.url, address) else None)
    page.goto(address)
    to_tab(page, tab)
    return page


def to_tab(page: Any, name: str) -> None:
    """Open a tab, which is in a menu where the page is narrow."""
    tab = page.get_by_role("tab", name=name)
    page.get_by_role("tab", name="Rank").wait_for()
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown").get_by_text(name)
    tab.click()


def _own(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def expect(page: Any, selector: str, text: str) -> None:
    playwright.expect(page.locator(selector)).to_contain_text(re.compile(text), timeout=WAIT)


def photograph(page: Any, name: str) -> None:
    if SCREENSHOTS:
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_role("tabpanel").filter(visible=True).get_by_label(label, exact=True).first.click()
    page.get_by_role("option", name=option, exact=True).click()


def start_labeling(page: Any, rater: str, folder: Path, order: str = "random") -> None:
    page.locator("#rater input, #rater textarea").first.fill(rater)
    choose(page, "Folder", str(folder))
    page.get_by_role("tabpanel").filter(visible=True).get_by_label(order, exact=True).check()
    page.locator("#start").click()
    page.locator("#answer-left").wait_for()


def test_rank(browser: Any, address: str, place: Path) -> None:
    page = opened(browser, address)
    page.locator("#files input[type=file]").set_input_files([str(place / "images" / f"{i}.png") for i in range(6)])
    page.locator("#rank-prompt textarea").fill(caption(0, 4))
    choose(page, "Second reward", "mst_clipiqa")
    page.locator("#rank").click()
    expect(page, "#rank-status", "6 images scored")
    assert page.locator("#rank-table tr").count() >= 7
    expect(page, "#rank-table", "largest disagreements.*place by compact.*place by mst_clipiqa")
    page.locator("#ranked button img").first.click()
    page.locator("#heat img").wait_for()
    photograph(page, "rank")
    with page.expect_download() as download:
        page.get_by_text("Download CSV").click()
    rows = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    totals = [float(row.split(",")[2 + row.count(",") - rows[0].count(",")]) for row in rows[1:]]
    assert len(rows) == 7 and totals == sorted(totals, reverse=True)
    assert page.foreign == []


def lateness() -> float:
    """By how much other processes stretch what is computed here: 1 on a machine that does nothing else."""
    wall, own = time.monotonic(), time.process_time()
    sum(range(10**7))
    return max(1.0, (time.monotonic() - wall) / (time.process_time() - own))


def test_a_whole_folder_is_uploaded(browser: Any, address: str, place: Path) -> None:
    page = opened(browser, address)
    page.locator("input[webkitdirectory]").set_input_files(place / "images")  # with texts beside the images
    playwright.expect(page.locator("#files tr")).to_have_count(10, timeout=WAIT)
    page.locator("#rank").click()
    expect(page, "#rank-status", "10 images scored")


def test_the_page_and_the_progress_show_soon(browser: Any, address: str, place: Path) -> None:
    """The best of three each, in seconds of a machine that does nothing else."""
    painted, shown = [], []
    files = [place / "images" / f"{number % 10}.png" for number in range(16)]
    dropped = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": f.read_bytes()} for i, f in enumerate(files)]
    page = opened(browser, address)
    page.locator("#files input[type=file]").set_input_files(dropped)
    playwright.expect(page.locator("#files tr")).to_have_count(16, timeout=WAIT)
    for number in range(3):
        page.locator("#rank-prompt textarea").fill(f"prompt {number}")  # nothing is known of it yet
        start = time.monotonic()
        page.locator("#rank").click()
        page.locator("#rank-status .done").wait_for()
        shown.append((time.monotonic() - start) / lateness())
        expect(page, "#rank-status", "16 images scored")
    for _ in range(3):
        start = time.monotonic()
        opened(browser, address).context.close()  # once the tabs are there
        painted.append((time.monotonic() - start) / lateness())
    print(f"painted after {painted} s, progress after {shown} s")
    assert min(painted) < 3 and min(shown) < 0.5


def test_markup_in_names_and_prompts_is_text(browser: Any, address: str, place: Path) -> None:
    page = opened(browser, address)
    choose(page, "or folder", str(place / "evil"))
    page.locator("#rank").click()
    expect(page, "#rank-status", "2 images scored")
    expect(page, "#rank-table", "<img src=x")
    page.get_by_role("tab", name="Label").click()
    start_labeling(page, EVIL, place / "evil")
    expect(page, "#label-status", "<script>")
    assert page.title() == "aigiqa-reward"


def test_labeling_by_keys_with_a_reload_and_a_second_rater(browser: Any, address: str, place: Path) -> None:
    page, labels = opened(browser, address, tab="Label"), Labels(place / "out" / "labels.sqlite3")
    start_labeling(page, "ann", place / "images", "least sure first")
    for number in range(30):
        if number == 15:
            page.reload()
            page.get_by_role("tab", name="Label").click()
        expect(page, "#label-status", f"labeled {number} of 45")
        if number == 3:
            photograph(page, "label")
        page.keyboard.press(("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown")[number % 4])
    expect(page, "#label-status", "labeled 30 of 45")
    page.keyboard.press("u")
    expect(page, "#label-status", "labeled 29 of 45")
    assert labels.counts()["ann"] == (29, 0)
    other = opened(browser, address, tab="Label")
    start_labeling(other, "bob", place / "images", "least sure first")
    expect(other, "#label-status", "bob: labeled 0 of 45")
    other.keyboard.press("ArrowUp")  # a tie, where ann chose the left one
    expect(other, "#agreement", r"ann 29, bob 1.* · agreement between raters \(alpha\): choices 0\.00")
    expect(other, "#agreement", r"compact agrees with \d+ of 15 choices")
    other.locator("#export").click()
    other.get_by_label("pairs.parquet").wait_for()


def test_a_killed_page_continues_where_it_was(browser: Any, place: Path) -> None:
    with served(place, "killed") as (address, process):
        page = opened(browser, address, tab="Label")
        start_labeling(page, "ann", place / "images")
        for number in range(3):
            expect(page, "#label-status", f"labeled {number} of 45")
            page.keyboard.press("ArrowLeft")
        expect(page, "#label-status", "labeled 3 of 45")
        page.keyboard.press("ArrowLeft")
        process.kill()
    kept = len(Labels(place / "killed" / "labels.sqlite3").choices())
    assert kept in (3, 4)
    with served(place, "killed", address.rpartition(":")[2].strip("/")):
        page.reload()
        to_tab(page, "Label")
        expect(page, "#label-status", f"labeled {kept} of 45")


def test_teach(browser: Any, address: str, place: Path) -> None:
    page = opened(browser, address, tab="Teach")
    page.locator("#teach").click()  # another test may have made 15 choices that prefer an image
    page.get_by_text("expected at least 20 choices").wait_for()
    labels, images = Labels(place / "out" / "labels.sqlite3"), sorted(map(str, (place / "images").glob("*.png")))
    for number, pair in enumerate(combinations(images, 2)):
        labels.choose("dan", pair_of(caption(1, number % 8), pair), "first")  # prompts of no other test
    page.locator("#teach").click()
    expect(page, "#taught", r"Agreement with \d+ held-out choices on other prompts: .* before, .* after")
    photograph(page, "teach")
    command = shlex.split(page.locator("#teach-status .reproduce").inner_text())
    result = run(*command[1:-1], place / "by-command")
    assert result.exit_code == 0, result.output
    to_tab(page, "Rank")
    choose(page, "Reward", "taught: mine")


def test_generate_stop_and_wait_in_the_queue(browser: Any, address: str, place: Path) -> None:
    page = opened(browser, address, tab="Generate")
    page.locator("#prompt textarea").fill("a penguin on a red background")
    page.locator("#candidates input[type=number]").fill("64")
    page.locator("#generate").click()
    page.locator("#best img").wait_for()
    other = opened(browser, address)
    choose(other, "or folder", str(place / "images"))
    other.locator("#rank").click()
    expect(other, "#rank-status", r"queue: 1/1")
    page.locator("#stop").click()
    expect(page, "#generate-status", r"Stopped after \d+ of 64")
    expect(other, "#rank-status", "10 images scored")
    assert 2 <= page.locator("#made button img").count() < 64
    expect(page, "#call", r"manual_seed\(\d+\)")
    page.locator("#candidates input[type=number]").fill("4")
    page.locator("#generate").click()
    expect(page, "#generate-status", "Made 4 of 4")
    page.get_by_label("Plot").or_(page.locator(".matplotlib img")).first.wait_for()
    photograph(page, "generate")


def test_runs(browser: Any, address: str, place: Path) -> None:
    page = opened(browser, address, tab="Runs")
    choose(page, "Run", f"{place / 'runs'}/draft")
    expect(page, "#run-about", "fine-tuning")
    page.locator("#curves img").wait_for()
    last = page.locator("#grid img").get_attribute("src")
    photograph(page, "runs")
    page.locator("#validation-step input[type=range]").press("Home")
    playwright.expect(page.locator("#grid img")).not_to_have_attribute("src", last or "", timeout=WAIT)
    page.locator("#live input").check()
    with (place / "runs" / "draft" / "history.jsonl").open("a", encoding="utf-8") as history:
        history.write(json.dumps({"step": 9, "seconds": 9.0, "reward": 0.7, "kl": 0.0}) + "\n")
    expect(page, "#run-about", "step 9")


def test_eight_sessions_get_their_own_results(address: str, place: Path) -> None:
    from gradio_client import Client, handle_file

    from aigiqa_reward import Scorer, create_reward

    files = [place / "images" / f"{number}.png" for number in range(8)]

    def ranked(number: int) -> dict[str, Any]:
        client = Client(address, verbose=False)
        given = ([handle_file(files[number])], "none", f"prompt {number}", "compact", "none")
        found = client.predict(*given, api_name="/ranking")[-1]
        return json.loads(Path(found["value"] if isinstance(found, dict) else found).read_text(encoding="utf-8"))

    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(ranked, range(8)))
    expected = Scorer(create_reward("compact")).score(files, [f"prompt {number}" for number in range(8)]).total
    assert [row["prompt"] for row in rows] == [f"prompt {number}" for number in range(8)]
    np.testing.assert_allclose([row["total"] for row in rows], expected, atol=1e-5)


@pytest.mark.parametrize("tab", ["Rank", "Generate", "Label", "Teach", "Runs"])
def test_a_phone_needs_no_scrolling_to_the_side(browser: Any, address: str, place: Path, tab: str) -> None:
    page = opened(browser, address, width=390, tab=tab)
    if tab == "Label":
        start_labeling(page, "cat", place / "images")
    photograph(page, f"phone-{tab.lower()}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

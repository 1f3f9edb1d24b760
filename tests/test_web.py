"""The page of `aigiqa-reward web` without a browser: labels on disk, agreement, the command line, safety."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import prompt_files
import pytest
from commands import ENVIRONMENT, only_error, run
from PIL import Image

from aigiqa_reward.datasets import PreferencePairs, read_data, read_preference_pairs
from aigiqa_reward.evaluation import krippendorff_alpha
from aigiqa_reward.web.labels import Labels, pair_of

PUBLISHED = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
"""Four observers and twelve units of Krippendorff 2011, whose alphas are 0.743 and 0.849."""


def picture(path: Path, color: str = "red", prompt: str = "a red square") -> Path:
    Image.new("RGB", (32, 32), color).save(path)
    path.with_suffix(".txt").write_text(prompt, encoding="utf-8")
    return path


def test_alpha_is_the_published_one() -> None:
    units = [[value for value in column if value is not None] for column in zip(*PUBLISHED, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, level="interval") == pytest.approx(0.849, abs=5e-4)
    assert math.isnan(krippendorff_alpha([[1], [2]])) and math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    with pytest.raises(ValueError, match="level: expected 'nominal' or 'interval', got 'ratio'"):
        krippendorff_alpha(units, level="ratio")  # pyright: ignore[reportArgumentType]


def test_labels_are_kept_once_and_undone(tmp_path: Path) -> None:
    labels, pair = Labels(tmp_path / "labels.sqlite3"), pair_of("a fox", ("b.png", "a.png"))
    assert (pair.first, pair.second) == ("a.png", "b.png")
    labels.choose("ann", pair, "first")
    labels.choose("ann", pair, "second")  # a repeated key
    labels.choose("bob", pair, "second")
    labels.rate("ann", "a fox", "a.png", 4, 2.5)
    again = Labels(tmp_path / "labels.sqlite3")  # another process
    assert again.choices() == [("ann", pair, "first"), ("bob", pair, "second")]
    assert again.counts() == {"ann": (1, 1), "bob": (1, 0)}
    assert again.alphas()["choices"] < 0.5
    assert labels.undo("bob", "choices") == ("a fox", "a.png", "b.png") and labels.undo("bob", "choices") is None
    assert again.done("bob", "choices") == set() and len(again.done("ann", "choices")) == 1


def test_exported_labels_are_read_by_the_commands(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    first, second = (str(picture(tmp_path / name)) for name in ("a.png", "b.png"))
    labels, pair = Labels(tmp_path / "labels.sqlite3"), pair_of("a red square", (first, second))
    assert labels.export(tmp_path / "out") == []
    for rater, choice in {"ann": "second", "bob": "tie", "eve": "bad"}.items():
        labels.choose(rater, pair, choice)  # pyright: ignore[reportArgumentType]
    labels.choose("ann", pair_of("", (first, second)), "first")  # the commands need a prompt
    labels.rate("ann", "a red square", first, 4, 2)
    labels.rate("bob", "a red square", first, 5, 3)
    assert [file.name for file in labels.export(tmp_path / "out")] == ["pairs.parquet", "ratings.csv"]
    for pairs in (read_preference_pairs(tmp_path / "out"), read_data(f"pairs:{tmp_path / 'out'}")):
        assert isinstance(pairs, PreferencePairs)
        assert (pairs.prompts, pairs.better, pairs.worse) == (("a red square",), (Path(second),), (Path(first),))
    rated: Any = read_data(f"csv:{tmp_path / 'out' / 'ratings.csv'}")
    assert rated.quality.tolist() == [4.5] and rated.correspondence.tolist() == [2.5]


@pytest.mark.slow
def test_killed_while_labeling_no_choice_is_lost(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from aigiqa_reward.web.labels import Labels, pair_of\n"
        "labels, start = Labels(Path(sys.argv[1])), int(sys.argv[2])\n"
        "for i in range(start, start + 10**6):\n"
        "    labels.choose('ann', pair_of('p', (f'a{i}', f'b{i}')), 'tie'); print(i, flush=True)"
    )
    file, said = tmp_path / "labels.sqlite3", []
    for _ in range(20):
        start = said[-1] + 1 if said else 0
        command = [sys.executable, "-c", script, str(file), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
            assert process.stdout is not None
            said += [int(process.stdout.readline()) for _ in range(3)]
            process.kill()
            said += [int(line) for line in process.stdout.read().split()]
    kept = [int(pair.first[1:]) for _, pair, _ in Labels(file).choices()]
    assert set(said) <= set(kept) and len(set(kept)) == len(kept) and len(kept) <= len(said) + 20


# --------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-folder",), "expected folders, got 'no-folder'"),
        (("--host", "0.0.0.0"), "--auth: expected a user and a password for 0.0.0.0, which other machines can reach"),
        (("--port", "{port}"), "--port: {port} is taken; choose another port"),
        (("--auth", "ann"), "--auth: expected USER:FILE, got 'ann'"),
        (("--auth", "ann:{blank}"), "--auth: expected the password in the first line"),
        (("--reward", "compakt"), "--reward: no reward is called 'compakt'; did you mean 'compact'?"),
        (("--model", "nowhere"), "--model: expected a folder of a pipeline"),
    ],
)
def test_wrong_usage_is_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    pytest.importorskip("gradio")
    (tmp_path / "blank").write_text("\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        known = {"port": taken.getsockname()[1], "blank": tmp_path / "blank"}
        error = only_error(run("web", *(text.format(**known) for text in arguments), cwd=tmp_path))
    assert message.format(**known) in error


# --------------------------------------------------------------------------------------------- the page

EVIL = "<img src=x onerror=alert`1`>"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("gradio", reason="the page needs the extra web")
    from aigiqa_reward.web import Studio

    folder = tmp_path_factory.mktemp("images")
    for color in ("red", "green", "blue"):
        picture(folder / f"{color} {EVIL}.png", color, prompt=EVIL)
    outside = tmp_path_factory.mktemp("outside")
    (folder / "link.png").symlink_to(picture(outside / "private.png"))
    return Studio([folder], tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def app(studio: Any) -> Any:
    from aigiqa_reward.web.server import _application

    return _application(studio, local=True, auth=("ann", "secret"))


@pytest.fixture
def client(app: Any) -> Any:
    from starlette.testclient import TestClient

    return TestClient(app, base_url="http://127.0.0.1")


def test_only_images_in_the_folder_are_listed(studio: Any) -> None:
    (name, folder), *_ = studio.folders.items()
    found = studio.images(name)
    assert len(found) == 3 and all(Path(path).parent == folder and prompt == EVIL for path, prompt in found)
    with pytest.raises(ValueError, match=r"folder: expected one of .*, got '/etc'"):
        studio.images("/etc")
    with pytest.raises(ValueError, match=r"reward: expected one of compact, .*, got '/etc'"):
        studio.reward("/etc")


def test_prompts_are_those_of_the_images_or_the_text(tmp_path: Path) -> None:
    from aigiqa_reward.web.studio import PROMPTS, with_prompt

    own, none = prompt_files.a1111_png(tmp_path / "own.png", "a (red:1.2) fox"), picture(tmp_path / "none.png")
    none.with_suffix(".txt").unlink()
    found = {source: [with_prompt(str(file), "a hat", source) for file in (own, none)] for source in PROMPTS}
    assert [[each.prompt for each in some] for some in found.values()] == [
        ["a red fox", "a hat"], ["a hat", "a hat"], ["a red fox", ""], ["a red fox", ""], ["", ""],
    ]  # fmt: skip
    assert found["auto"][0].raw_prompt == "a (red:1.2) fox"
    assert "there is no prompt in it" in (found["embedded"][1].error or "")


def test_names_and_prompts_are_escaped(studio: Any) -> None:
    from aigiqa_reward.web import rank

    scores = [
        rank.Score(path=path, prompt=prompt, total=0.5) for path, prompt in studio.images(next(iter(studio.folders)))
    ]
    failed = [rank.Score(path=EVIL, prompt="", error=EVIL)]
    pages = (rank._bars(scores), rank._failures(failed), rank._disagreements({EVIL: scores, "b": scores[::-1]}))
    assert all("<img" not in page and "&lt;img" in page for page in pages)


def test_nothing_is_answered_without_the_password(client: Any) -> None:
    file = next(iter(client.app.routes)) and "/gradio_api/file=/etc/passwd"
    assert client.get(file).status_code in (401, 403, 404)
    assert client.get("/config").status_code == 401
    assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400


def test_only_named_folders_are_served_and_only_to_this_host(client: Any, studio: Any) -> None:
    assert client.post("/login", data={"username": "ann", "password": "secret"}).status_code == 200
    folder = next(iter(studio.folders.values()))
    inside = next(folder.glob("*.png"))
    assert client.get(f"/gradio_api/file={inside}").status_code == 200
    for path in (
        "/etc/passwd",
        f"{folder}/../../../../etc/passwd",
        studio.labels.file,
        __file__,
        "http://example.com/a.png",
    ):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/", headers={"host": "attacker.example"}).status_code == 400


def test_large_uploads_are_refused(client: Any) -> None:
    client.post("/login", data={"username": "ann", "password": "secret"})
    sent = {
        size: client.post("/gradio_api/upload", files={"files": ("a.png", bytes(size))}) for size in (1000, 2**25 + 1)
    }
    assert [answer.status_code for answer in sent.values()] == [200, 413]


def test_least_sure_pairs_come_first(studio: Any, tmp_path: Path) -> None:
    from aigiqa_reward.web.studio import Score

    images = [(str(tmp_path / f"{name}.png"), "p") for name in "abc"]
    for (path, prompt), total in zip(images, (0.1, 0.9, 0.5), strict=True):
        Image.new("RGB", (16, 16)).save(path)
        key = ("fake", path, Path(path).stat().st_mtime_ns, prompt)
        studio._scores[key] = Score(path=path, prompt=prompt, total=total, uncertainty=0.1)
    order = [
        {Path(pair.first).stem, Path(pair.second).stem} for pair in studio.pairs(images, "least sure first", "fake")
    ]
    assert order[-1] == {"a", "b"} and len(order) == 3


@pytest.mark.slow
def test_a_taught_reward_is_in_the_list(studio: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from aigiqa_reward.web.teach import teach

    for number in range(24):
        images = [
            str(picture(tmp_path / f"{number}{name}.png", color)) for name, color in (("a", "red"), ("b", "blue"))
        ]
        studio.labels.choose("ann", pair_of(f"a red square {number // 4}", (images[0], images[1])), "first")
    text = teach(studio.labels.pairs(), studio.taught / "mine")
    assert "held-out choices on other prompts" in text and "before" in text
    assert "taught: mine" in studio.reward_names
    *_, scores = studio.score("taught: mine", [(images[0], "a red square")])
    assert scores[0].error is None and 0 < scores[0].total < 1.5

"""docs/licenses.md names everything that an installation brings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import licenses
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licenses.md"

if not PAGE.is_file():
    pytest.skip("docs/ is not beside the tests, as in an sdist", allow_module_level=True)

FIRST_CELLS = re.findall(r"^\| `?([\w.-]+)`? \| [^|]*\w", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_base_dependency_has_a_license() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["dependencies"]:
        assert re.match(r"[\w.-]+", requirement).group() in FIRST_CELLS  # pyright: ignore[reportOptionalMemberAccess]


def test_every_embedded_folder_has_a_license() -> None:
    folders = {folder.name for folder in (ROOT / "aigiqa_reward" / "assets").iterdir() if folder.is_dir()}
    assert folders <= set(FIRST_CELLS)
    assert folders == licenses.EMBEDDED.keys()


def test_what_the_page_lacks_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert licenses.missing() == []
    shorter = PAGE.read_text(encoding="utf-8").replace("| torch |", "| other |").replace("| `world` |", "| `none` |")
    (tmp_path / "licenses.md").write_text(shorter)
    monkeypatch.setattr(licenses, "PAGE", tmp_path / "licenses.md")
    assert licenses.missing() == ["torch", "world"]

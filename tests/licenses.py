"""Write docs/licenses.md: licenses of everything that comes with an installation, from the packages' own metadata.

    python tests/licenses.py            # writes the table
    python tests/licenses.py --check    # fails where the table lacks a dependency or an embedded folder

Run it in an environment in which the package is installed; the license of a package is what its metadata say.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licenses.md"
ASSETS = ROOT / "aigiqa_reward" / "assets"
_HEAD = """# Licenses

The package is under {license}. This page is written by `python tests/licenses.py` from the metadata of the
packages that were installed when it ran.

## Dependencies

| package | license, as its metadata state it | needed for |
| --- | --- | --- |
"""
_ASSETS = """
## Embedded files

Each folder of `aigiqa_reward/assets` has a card that says how it was made.

| folder | MB | license | made from |
| --- | ---: | --- | --- |
"""
_SCORES = "weights trained here on human scores of AGIQA-3K (MIT)"

EMBEDDED = {
    "compact": ("Apache-2.0", f"{_SCORES}, and on pictures of the embedded world (MIT)"),
    "cpa_iqa": ("Apache-2.0", _SCORES),
    "generator": ("Apache-2.0", "weights trained here on pictures composed of the embedded world (MIT)"),
    "judge": ("Apache-2.0", "weights trained here on pictures composed of the embedded world (MIT)"),
    "ma_agiqa": ("Apache-2.0", _SCORES),
    "mst_clipiqa": ("Apache-2.0", _SCORES),
    "sc_agiqa": ("Apache-2.0", _SCORES),
    "towers": ("Apache-2.0", "EfficientNet-Lite0, and MiniLM-L6 as packaged under MIT; the alignment was trained here"),
    "tsp_mgs": ("Apache-2.0", _SCORES),
    "world": ("MIT", "Fluent Emoji, copyright Microsoft Corporation; the license text is in the folder"),
}
"""Of each embedded folder: its license, and what it was made from, as its card says at length."""


def requirements() -> dict[str, str]:
    """Names of all direct dependencies, and the extra that needs each; "base" for those that always come."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {_name(each): "base" for each in project["dependencies"]}
    for extra, listed in project["optional-dependencies"].items():
        for each in listed:
            if _name(each) != project["name"]:
                found.setdefault(_name(each), extra)
    return found


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]


def license_of(package: str) -> str:
    """What a package's metadata say: the SPDX expression, or else the classifiers, or else the first line of text."""
    try:
        told = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return "not installed when this page was written"
    names = [each.rpartition(" :: ")[2] for each in told.get_all("Classifier", []) if each.startswith("License :: ")]
    names = [name for name in names if name != "OSI Approved"]
    text = told.get("License-Expression") or ", ".join(names) or (told.get("License") or "").strip().partition("\n")[0]
    return text[:80].strip().replace("|", "/") or "not stated"


def page() -> str:
    """The page as Markdown."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [f"| {name} | {license_of(name)} | {extra} |" for name, extra in requirements().items()]
    embedded = [
        f"| `{folder.name}` | {_megabytes(folder):.1f} | {' | '.join(EMBEDDED[folder.name])} |"
        for folder in sorted(ASSETS.iterdir())
        if folder.is_dir()
    ]
    return _HEAD.format(license=project["license"]) + "\n".join(lines) + "\n" + _ASSETS + "\n".join(embedded) + "\n"


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def missing() -> list[str]:
    """What the page does not name."""
    text = PAGE.read_text(encoding="utf-8")
    folders = [folder.name for folder in ASSETS.iterdir() if folder.is_dir()]
    return [name for name in requirements() if f"| {name} |" not in text] + [
        name for name in folders if f"| `{name}` |" not in text
    ]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(f"{PAGE} does not name {', '.join(missing())}" if missing() else 0)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")

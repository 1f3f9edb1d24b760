"""Write docs/licenses.md: the licenses of all that an installation brings, from the packages' own metadata.

python docs/licenses.py
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_SCORES = "weights trained on human scores of AGIQA-3K (MIT)"

EMBEDDED = {
    "compact": ("Apache-2.0", "weights trained on AGIQA-3K, BIQ2021, Flickr8k, VISOR and the emoji world: see below"),
    "cpa_iqa": ("Apache-2.0", _SCORES),
    "generator": ("Apache-2.0", "weights trained on pictures of the emoji world (MIT)"),
    "judge": ("Apache-2.0", "weights trained on pictures of the emoji world (MIT)"),
    "laion_aesthetic": (
        "Apache-2.0",
        "head of christophschuhmann/improved-aesthetic-predictor, folded into one affine map",
    ),
    "ma_agiqa": ("Apache-2.0", _SCORES),
    "mst_clipiqa": ("Apache-2.0", _SCORES),
    "sc_agiqa": ("Apache-2.0", _SCORES),
    "towers": (
        "Apache-2.0",
        "EfficientNet-Lite0, and MiniLM-L6 as packaged under MIT; alignment trained for this package",
    ),
    "tsp_mgs": ("Apache-2.0", _SCORES),
    "verify": ("MIT", "two images of AGIQA-3K; the license text is in the folder"),
    "world": ("MIT", "Fluent Emoji, copyright Microsoft Corporation; the license text is in the folder"),
}
"""License and origin of each folder in aigiqa_reward/assets."""

TRAINING = {
    "AGIQA-3K (Li et al. 2023)": ("1,908 images of 192 prompts with human scores", "MIT"),
    "BIQ2021 (Ahmed and Asif 2022)": (
        "10,000 photographs with human quality scores",
        "no license file; its README says that 8,000 of the 12,000 images come from Unsplash and 4,000 are the "
        "authors' own, the paper calls it freely available",
    ),
    "Flickr8k (Hodosh et al. 2013)": (
        "6,000 photographs, five captions each",
        "the images belong to Flickr users and were distributed for non-commercial research and education",
    ),
    "VISOR (Gokhale et al. 2022)": ("2,240 generated images and their prompts", "MIT"),
    "the emoji world": ("composed pictures and captions", "MIT"),
}
"""Part and terms of each data set that the weights of `compact` learned from."""


def requirements() -> dict[str, str]:
    """Names of all direct dependencies, with the extra that needs each; "base" for those that always come."""
    listed = [("base", PROJECT["dependencies"]), *PROJECT["optional-dependencies"].items()]
    found: dict[str, str] = {}
    for extra, packages in listed:
        for package in packages:
            found.setdefault(re.split(r"[\[<>=!~; ]", package, maxsplit=1)[0], extra)
    found.pop(PROJECT["name"], None)
    return found


def license_of(package: str) -> str:
    """SPDX expression, else classifiers, else first line of the license text in a package's metadata."""
    try:
        found = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return "not installed when this page was written"
    names = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier", []) if c.startswith("License :: ")]
    names = [name for name in names if name != "OSI Approved"]
    text = found.get("License-Expression") or ", ".join(names) or (found.get("License") or "").strip()
    return text.partition("\n")[0][:80].strip().replace("|", "/") or "not stated"


def page() -> str:
    """The page as Markdown."""
    packages = [f"| {name} | {license_of(name)} | {extra} |" for name, extra in requirements().items()]
    folders = []
    for folder in sorted(path for path in (ROOT / "aigiqa_reward" / "assets").iterdir() if path.is_dir()):
        megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        folders.append(f"| `{folder.name}` | {megabytes:.1f} | {' | '.join(EMBEDDED[folder.name])} |")
    return "\n".join(
        [
            "# Licenses\n",
            f"The package is under {PROJECT['license']}. `python docs/licenses.py` writes this page from the",
            "metadata of the installed packages.\n",
            "## Dependencies\n",
            "| package | license in its metadata | needed for |",
            "| --- | --- | --- |",
            *packages,
            "\n## Embedded files\n",
            "Each folder of `aigiqa_reward/assets` has a model card that says how it was made.\n",
            "| folder | MB | license | made from |",
            "| --- | ---: | --- | --- |",
            *folders,
            "\n## Training data\n",
            "No image of these data sets is in the package, except the ones of AGIQA-3K listed above. What the",
            "weights of `compact` learned from:\n",
            "| data | part | terms |",
            "| --- | --- | --- |",
            *(f"| {name} | {' | '.join(facts)} |" for name, facts in TRAINING.items()),
            "\nWhether these terms extend to trained weights is not settled. If they matter to you, train a variant",
            "without a data set: `python examples/train_compact/train.py --without flickr8k biq2021`. The five",
            "systems' heads learned from AGIQA-3K alone.",
        ]
    )


if __name__ == "__main__":
    (ROOT / "docs" / "licenses.md").write_text(page() + "\n", encoding="utf-8")

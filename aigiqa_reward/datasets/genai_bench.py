"""Reader of the image part of GenAI-Bench in its published layout.

Source: B. Li et al., "GenAI-Bench: Evaluating and Improving Compositional Text-to-Visual Generation", 2024, arXiv
2406.13743; https://huggingface.co/datasets/BaiqiL/GenAI-Bench-1600 (1,600 prompts, six models),
https://huggingface.co/datasets/zhiqiulin/GenAI-Bench-527.

Found: genai_image.json of the 1,600 prompts, and the paths of the images in t2v_metrics' dataset.py. The three ratings,
1 to 5, are of the correspondence to the prompt. Ours: the pairs; the paper reports correlations over all images.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import StatisticsError, fmean

from aigiqa_reward.datasets.base import PreferencePairs
from aigiqa_reward.datasets.ranked import ranked_pairs, read_published_json

_EXPECTED = 'the fields prompt and models, as in {"00000": {"prompt": "a cat", "models": {"DALLE_3": [5, 4, 5]}}}'


def read_genai_bench(path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None) -> PreferencePairs:
    """Read the ratings as pairs; no image is opened.

    Every two images of a prompt give a pair, the one of the higher mean rating the better; two of one mean give none.
    The group of a pair is its prompt.

    Args:
        path: folder that holds `genai_image.json`.
        images: folder that holds the unpacked folder of each model, with images `{id}.jpeg`. None: the same folder.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from aigiqa_reward.datasets import read_genai_bench
        >>> for model in ("DALLE_3", "SDXL_Base"):
        ...     Path("genai", model).mkdir(parents=True)
        ...     Path("genai", model, "00000.jpeg").touch()
        >>> entry = {"id": "00000", "prompt": "a red fox", "models": {"DALLE_3": [5, 4, 5], "SDXL_Base": [3, 3, 2]}}
        >>> _ = Path("genai/genai_image.json").write_text(json.dumps({"00000": entry}))
        >>> read_genai_bench("genai").better[0].parent.name
        'DALLE_3'
    """
    file = Path(path) / "genai_image.json"
    if not file.is_file():
        raise ValueError(f"path: expected a folder that holds genai_image.json and the models' folders, got {path!s}")
    entries = read_published_json(file)
    rows = []
    for name, entry in entries.items() if isinstance(entries, dict) else [("none", entries)]:
        try:
            prompt, models = entry["prompt"], entry["models"]
            paths = [f"{model}/{name}.jpeg" for model in models]
            ranks = [-fmean(ratings) for ratings in models.values()]
        except (KeyError, TypeError, AttributeError, StatisticsError) as error:
            raise ValueError(f"{file}, entry {name!r}: expected {_EXPECTED}, got {entry!r:.200}") from error
        rows.append((f"{file}, entry {name!r}", prompt, paths, ranks))
    return ranked_pairs(rows, ("prompt", "models", "ratings"), file.parent if images is None else Path(images), file)

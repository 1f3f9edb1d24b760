"""Benchmarks by name, so that a command takes its data as NAME:PATH."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aigiqa_reward.datasets.agiqa1k import read_agiqa1k
from aigiqa_reward.datasets.agiqa3k import read_agiqa3k
from aigiqa_reward.datasets.aigciqa2023 import read_aigciqa2023
from aigiqa_reward.datasets.aigiqa20k import read_aigiqa20k
from aigiqa_reward.datasets.base import PreferencePairs, ScoredImages
from aigiqa_reward.datasets.genai_bench import read_genai_bench
from aigiqa_reward.datasets.hpdv2 import read_hpdv2
from aigiqa_reward.datasets.imagereward import read_imagereward
from aigiqa_reward.datasets.pairs import read_preference_pairs
from aigiqa_reward.datasets.pickapic import read_pickapic
from aigiqa_reward.datasets.table import read_table

if TYPE_CHECKING:
    from aigiqa_reward.images import PromptSource


@dataclass(frozen=True)
class Source:
    """A benchmark that can be read by name: the function that reads a path, and a description of the path.

    Example:
        >>> from aigiqa_reward.datasets import SOURCES, Source
        >>> source: Source = SOURCES["agiqa3k"]
        >>> source.path
        'the folder that holds data.csv and images/'
    """

    reader: Callable[[Path], ScoredImages | PreferencePairs]
    path: str


SOURCES: dict[str, Source] = {
    "agiqa3k": Source(read_agiqa3k, "the folder that holds data.csv and images/"),
    "agiqa1k": Source(read_agiqa1k, "the folder that holds AIGC_MOS_Zscore.xlsx and file/"),
    "aigciqa2023": Source(read_aigciqa2023, "the folder that holds DATA/ and Image/"),
    "aigiqa20k": Source(read_aigiqa20k, "the folder that holds info_train.csv and train/"),
    "imagereward": Source(read_imagereward, "the JSON file, or the folder that holds train.json"),
    "hpdv2": Source(read_hpdv2, "the JSON file, or the folder that holds test.json"),
    "pickapic": Source(read_pickapic, "a parquet file, or a folder of those of one part"),
    "genai_bench": Source(read_genai_bench, "the folder that holds genai_image.json and the models' folders"),
    "pairs": Source(read_preference_pairs, "a folder with pairs.parquet, or such a file: prompt, winner, loser"),
    "csv": Source(
        read_table,
        "a table, such as a .csv, with the columns path, prompt and quality or correspondence",
    ),
}
"""Readers by the name of the benchmark. `csv` is for one's own scores, in any form of table,
and `pairs` for one's own choices."""


def read_data(source: str, prompts_from: PromptSource | None = None) -> ScoredImages | PreferencePairs:
    """Read a benchmark given as NAME:PATH with a name of `SOURCES`, such as `agiqa3k:~/data/agiqa3k`.

    Returns images with scores, or pairs of images (imagereward, hpdv2, pickapic, genai_bench, pairs). Of a csv without
    a column of prompts, `prompts_from` says where each image's own is read (see `read_table`).

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward.datasets import read_data
        >>> Image.new("RGB", (64, 64), "red").save("a.png")
        >>> with open("scores.csv", "w") as file:
        ...     print("path,prompt,quality", file=file)
        ...     print("a.png,a red square,3.5", file=file)
        >>> read_data("csv:scores.csv").quality
        array([3.5])
        >>> read_data("agiqa-3k:data")
        Traceback (most recent call last):
            ...
        ValueError: source: no data is called 'agiqa-3k'; did you mean 'agiqa3k'? Write one of ...
    """
    name, _, path = source.partition(":")
    forms = ", ".join(f"{known}:PATH" for known in SOURCES)
    if name not in SOURCES:
        if ":" not in source and (Path(source).exists() or any(mark in source for mark in "/\\.~")):
            raise ValueError(f"source: expected NAME:PATH, got the path {source!r}; write one of {forms}")
        close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), SOURCES, n=1, cutoff=0.5)
        meant = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"source: no data is called {name!r}{meant} Write one of {forms}")
    if not path.strip():
        raise ValueError(f"source: expected {name}:PATH, got {source!r}; PATH is {SOURCES[name].path}")
    if prompts_from is not None:
        if name != "csv":
            raise ValueError(f"prompts_from: {name} brings its prompts; leave it out")
        return read_table(Path(path).expanduser(), prompts_from)
    return SOURCES[name].reader(Path(path).expanduser())

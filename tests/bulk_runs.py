"""A Ray cluster of two CPUs, small image files, and the rows that bulk scoring wrote."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import dataset

from aigiqa_reward.bulk.cluster import keeping_sigterm

PROMPT = "a red square"


@contextmanager
def two_cpus(**options: Any) -> Iterator[Any]:
    """Start Ray with two CPUs, and stop it."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with keeping_sigterm():
        ray.init(num_cpus=2, _system_config={"worker_niceness": 0}, **quiet, **options)  # else slow beside other work
    yield ray
    with keeping_sigterm():
        ray.shutdown()


def pictures(count: int) -> dict[str, bytes]:
    """PNG files of three sizes, and a damaged one."""
    rng = np.random.default_rng(0)
    files = {}
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, (32, 40, 48)[i % 3], 3), dtype=np.uint8)).save(file, format="PNG")
        files[f"{i:03d}.png"] = file.getvalue()
    return files | {"broken.png": b"\x89PNG\r\n\x1a\n"}


def write_files(files: dict[str, bytes], folder: Path) -> Path:
    """Write files into a new folder."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return dataset.dataset(sorted(folder.glob("*.parquet"))).to_table().to_pylist()

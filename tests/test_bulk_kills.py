"""Bulk scoring on a real Ray cluster whose processes are killed, or run out of memory."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bulk_runs import PROMPT, pictures, rows_in, two_cpus, write_files
from commands import ENVIRONMENT, command, run

from aigiqa_reward.bulk.cluster import share
from aigiqa_reward.bulk.inputs import find_shards
from aigiqa_reward.bulk.scoring import BulkError, BulkScoring, Results, table_schema

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster where Pillow knows a format whose decoder kills its process, after a line in the file it names."""

    def add_deadly_format() -> None:
        from PIL import Image

        def decode(stream: Any, name: str) -> Any:
            stream.seek(len(b"DEADLY"))
            with open(stream.read(), "a") as file:  # noqa: PTH123  (bytes)
                file.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)

        Image.register_open("DEADLY", decode, lambda prefix: prefix.startswith(b"DEADLY"))

    with two_cpus(runtime_env={"worker_process_setup_hook": add_deadly_format}) as ray:
        yield ray


def test_an_image_that_kills_its_decoder_becomes_a_row_with_an_error(cluster: Any, tmp_path: Path) -> None:
    files = pictures(4) | {"deadly.png": b"DEADLY" + bytes(tmp_path / "log")}
    given = ["score", write_files(files, tmp_path / "images"), "--engine", "ray", "--cpus-per-worker", 2]
    result = run(*given, "--output-dir", tmp_path / "out", "--prompt", PROMPT, "--batch-size", 2)
    assert result.exit_code == 1, result.output
    rows = {Path(row["path"]).name: row for row in rows_in(tmp_path / "out")}
    assert sorted(rows) == sorted(files)
    assert [name for name, row in rows.items() if row["total"] is None] == ["broken.png", "deadly.png"]
    assert "was killed each time" in rows["deadly.png"]["error"]
    assert len((tmp_path / "log").read_text().splitlines()) == 6  # with the others of its block, then alone


def test_a_reward_that_runs_out_of_memory_ends_the_run_and_names_the_remedy(cluster: Any, tmp_path: Path) -> None:
    def hungry(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return torch.empty(len(images), 2**50).sum(1)

    shards, _ = find_shards([str(write_files(pictures(1), tmp_path / "images"))])
    scoring = BulkScoring(
        ray=cluster,
        workers=share(cluster, "cpu", 2),
        shards=shards,
        results=Results(tmp_path, table_schema(["hungry"], {})),
        build=lambda: {"hungry": hungry},  # pyright: ignore[reportArgumentType]
        prompt=PROMPT,
        prompts_from=None,
        batch_size=2,
        details=(),
        progress=lambda rows, errors, done: None,
    )
    with pytest.raises(BulkError, match=r"(?s)allocate memory.*; lower --batch-size"):
        scoring.run()


def test_workers_that_ray_kills_for_their_memory_end_the_command_with_what_to_reduce(tmp_path: Path) -> None:
    images, full = write_files(pictures(1), tmp_path / "images"), {"RAY_memory_usage_threshold": "0.01"}
    given = command("score", images, "--engine", "ray", "--output-dir", tmp_path / "out")
    result = subprocess.run(given, env={**ENVIRONMENT, **full}, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "memory" in result.stderr and "lower --batch-size" in result.stderr

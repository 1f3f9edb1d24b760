"""Checks of `--engine ray` that take long: equality, kills, memory and rate.

    python tests/benchmarks/bulk.py equality --images 2000
    python tests/benchmarks/bulk.py kills --images 2000 --kills 10
    python tests/benchmarks/bulk.py memory --images 500 5000
    python tests/benchmarks/bulk.py rate --images 400

The images are those of AGIQA-3K beside the checkout, repeated under other names; 1 % are cut off, for `rate` none.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from PIL import Image
from pyarrow import dataset, parquet

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "agiqa3k"
PROMPT = "a tray of sushi"


def pictures(count: int, side: int | None, broken: float = 0.01) -> dict[str, bytes]:
    """Image files by name, of `side` px and a little less, or as they are."""
    sources = sorted(path for path in DATA.rglob("*") if path.suffix in (".jpg", ".png"))
    files: dict[str, bytes] = {}
    for i in range(count):
        data = sources[i % len(sources)].read_bytes()
        if side is not None:
            with Image.open(io.BytesIO(data)) as image:
                small, sink = image.convert("RGB").resize((side, side - 8 * (i % 3))), io.BytesIO()
            small.save(sink, format="JPEG")
            data = sink.getvalue()
        name = f"{i:06d}.jpg"
        files[name] = data[: len(data) // 3] if broken and i % round(1 / broken) == 0 else data
    return files


def written(files: dict[str, bytes], folder: Path) -> dict[str, list[str]]:
    """The inputs of the command by form."""
    (folder / "images").mkdir(parents=True)
    for name, data in files.items():
        (folder / "images" / name).write_bytes(data)
    table = pa.table({"image": list(files.values()), "file_name": list(files)})
    parquet.write_table(table, folder / "all.parquet", row_group_size=300)
    names, tars = list(files), []
    for number in range(8):
        tars.append(str(folder / f"{number}.tar"))
        with tarfile.open(tars[-1], "w") as tar:
            for name in names[number::8]:
                tar.add(folder / "images" / name, name)
    return {"folder": [str(folder / "images")], "parquet": [str(folder / "all.parquet")], "tar": tars}


def command(given: list[str], out: Path, *more: object) -> list[str]:
    options = ["--engine", "ray", "--output-dir", out, "--prompt", PROMPT, "--device", "cpu", *more]
    return [sys.executable, "-m", "aigiqa_reward", "score", *given, *map(str, options)]


def rows_in(out: Path) -> dict[str, tuple[Any, ...]]:
    """Scores by the image's name; every row must be there once."""
    table = dataset.dataset(sorted(out.glob("part-*.parquet"))).to_table().to_pylist()
    rows = {row["path"].rpartition("::")[2].rpartition("/")[2]: row for row in table}
    assert len(rows) == len(table), f"{len(table) - len(rows)} rows twice"
    return {name: tuple(rows[name][column] for column in ("total", "quality", "error")) for name in sorted(rows)}


def equality(folder: Path, count: int, side: int) -> None:
    from aigiqa_reward import Scorer, create_reward

    files = pictures(count, side)
    inputs = written(files, folder)
    names = sorted(files)
    paths = [str(folder / "images" / name) for name in names]
    expected = Scorer(create_reward("compact")).score(paths, PROMPT, on_error="nan").total.tolist()
    for form, given in inputs.items():
        status = subprocess.run(command(given, folder / form)).returncode
        rows = rows_in(folder / form)
        assert list(rows) == names and status == 1
        unscored = [name for name, total in zip(names, expected, strict=True) if total != total]
        assert [name for name, row in rows.items() if row[0] is None] == unscored
        gaps = [abs(rows[n][0] - e) for n, e in zip(names, expected, strict=True) if rows[n][0] is not None]
        print(
            f"{form}: {len(rows)} rows, {len(unscored)} with an error, largest difference {max(gaps):.1e}", flush=True
        )


def kills(folder: Path, count: int, side: int, times: int, first: float) -> None:
    """Kill the driver or an actor at random moments; compare with a run that was left alone."""
    inputs = written(pictures(count, side), folder)["tar"]
    subprocess.run(command(inputs, folder / "alone"))
    expected, rng, out = rows_in(folder / "alone"), random.Random(0), folder / "killed"
    killed, run = {"driver": 0, "actor": 0}, None
    while sum(killed.values()) < times:
        if run is None:
            run = subprocess.Popen(command(inputs, out))
            time.sleep(first)
        time.sleep(rng.uniform(0, first))
        if run.poll() is not None:
            break
        family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        actors = [p for p in family if "MapWorker" in " ".join(p.cmdline())]
        if actors and rng.random() < 0.5:
            rng.choice(actors).kill()
            killed["actor"] += 1
        else:
            killed["driver"] += 1
            for process in family:  # those of Ray would end by themselves a little later
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            run.wait()
            run = None
        kept = sum(len(p.read_bytes().splitlines()) for p in (out / "unfinished").glob("*.jsonl"))
        parts = len(list(out.glob("part-*.parquet")))
        print(f"{killed}: {parts} parts and {kept} rows of others are kept", flush=True)
    run = run or subprocess.Popen(command(inputs, out))
    status, found = run.wait(), rows_in(out)
    assert status == 1 and list(found) == list(expected)
    assert [row[-1] for row in found.values()] == [row[-1] for row in expected.values()]
    gap = max(abs(found[name][0] - row[0]) for name, row in expected.items() if row[0] is not None)
    print(f"after {killed} kills: the same {len(expected)} rows, each once, largest difference {gap:.1e}")


def memory(folder: Path, counts: list[int], side: int) -> None:
    """Peak memory of the processes that score."""
    peaks = []
    for count in counts:
        inputs = written(pictures(count, side), folder / str(count))["tar"]
        run, peak = subprocess.Popen(command(inputs, folder / f"out-{count}")), 0
        while run.poll() is None:
            for process in psutil.Process(run.pid).children(recursive=True):
                try:
                    if "MapWorker" in " ".join(process.cmdline()):
                        peak = max(peak, process.memory_full_info().uss)
                except psutil.Error:
                    continue
            time.sleep(0.5)
        peaks.append(peak)
        print(f"{count} images: at most {peak / 2**20:.0f} MiB of private memory in an actor", flush=True)
    print(f"ratio {peaks[-1] / peaks[0]:.3f}")


def _plain(paths: list[str], seconds: Any) -> None:
    import torch

    from aigiqa_reward import Scorer, create_reward

    torch.set_num_threads(1)
    scorer = Scorer(create_reward("compact"))
    scorer.score(paths[:8], PROMPT)
    begun = time.perf_counter()
    scorer.score(paths, PROMPT)
    seconds.put(time.perf_counter() - begun)


def rate(folder: Path, count: int) -> None:
    """Images per second of two plain processes, and of one and two workers from their first rows on."""
    inputs = written(pictures(count, None, broken=0), folder)["folder"]
    paths = sorted(map(str, (folder / "images").iterdir()))
    seconds: Any = multiprocessing.get_context("spawn").Queue()
    shares = [multiprocessing.get_context("spawn").Process(target=_plain, args=(paths[i::2], seconds)) for i in (0, 1)]
    for share in shares:
        share.start()
    plain = count / max(seconds.get() for _ in shares)
    print(f"two plain processes: {plain:.2f} images per second", flush=True)
    for workers in (1, 2):
        out = folder / f"workers-{workers}"
        run = subprocess.Popen(
            command(inputs, out), env={**os.environ, "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": workers})}
        )
        seen: list[tuple[float, int]] = []
        while run.poll() is None:
            file = next((out / "unfinished").glob("*.jsonl"), None)
            rows = file.read_bytes().count(b"\n") if file else 0
            if rows and (not seen or rows > seen[-1][1]):
                seen.append((time.perf_counter(), rows))
            time.sleep(0.05)
        (start, first), (end, last) = seen[0], seen[-1]
        found = (last - first) / (end - start)
        print(
            f"{workers} workers: {found:.2f} images per second, {found / plain:.2f} of two plain processes", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["equality", "kills", "memory", "rate"])
    parser.add_argument("--images", type=int, nargs="+", default=[2000])
    parser.add_argument("--side", type=int, default=128, help="size of the images in px, but for rate")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--first", type=float, default=20.0, help="seconds before the first kill, at least")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.check == "equality":
            equality(folder, given.images[0], given.side)
        elif given.check == "kills":
            kills(folder, given.images[0], given.side, given.kills, given.first)
        elif given.check == "memory":
            memory(folder, given.images, given.side)
        else:
            rate(folder, given.images[0])


if __name__ == "__main__":
    main()

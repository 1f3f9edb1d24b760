"""Checks of `--engine ray` that take long: equality with `Scorer`, kills, memory and rate.

    python tests/benchmarks/bulk.py --folder bulk-checks            # all of them
    python tests/benchmarks/bulk.py --folder bulk-checks kills      # one
    python tests/benchmarks/bulk.py --folder tiny --share 0.02      # with 2 % of the images, to try it out

The same command continues: a check whose result is in the folder is not run again, and inputs and scores of equality
are kept. On two free cores all take about 16 minutes: equality 2, kills 7, memory 2, rate 5. The images are those of
AGIQA-3K beside the checkout, repeated under other names, at 128 px and 1 % of them cut off; for `rate` whole and as
they are. `equality` and `memory` take a tiny reward, at 4 ms per image, the others `compact`.
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
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from PIL import Image
from pyarrow import dataset, parquet

sys.path.append(str(Path(__file__).resolve().parents[1]))
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "agiqa3k"
PROMPT = "a tray of sushi"
BATCH = 8


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


def written(folder: Path, count: int, side: int | None = 128, **options: float) -> dict[str, list[str]]:
    """The inputs of the command by form."""
    names, tars = [f"{i:06d}.jpg" for i in range(count)], [folder / f"{number}.tar" for number in range(8)]
    if not (folder / "all.parquet").exists():  # which is written last
        (folder / "images").mkdir(parents=True, exist_ok=True)
        files = pictures(count, side, **options)
        for name, data in files.items():
            (folder / "images" / name).write_bytes(data)
        for number, path in enumerate(tars):
            with tarfile.open(path, "w") as tar:
                for name in names[number::8]:
                    tar.add(folder / "images" / name, name)
        table = pa.table({"image": list(files.values()), "file_name": names})
        parquet.write_table(table, folder / "all.parquet", row_group_size=300)
    return {"folder": [str(folder / "images")], "parquet": [str(folder / "all.parquet")], "tar": list(map(str, tars))}


def tiny_reward(folder: Path) -> Any:
    """A reward whose scores of images differ, saved as FOLDER/reward."""
    from clip_models import write_tiny_clip

    from aigiqa_reward import create_reward
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

    reward = create_reward("tsp_mgs", encoder=OpenCLIPConfig(architecture=f"local-dir:{write_tiny_clip(folder, 0)}"))
    reward.save_pretrained(folder / "reward")
    return reward


def command(given: list[str], out: Path, reward: object = "compact") -> list[str]:
    options = ["--engine", "ray", "--output-dir", out, "--prompt", PROMPT, "--device", "cpu", "--batch-size", BATCH]
    options += ["--reward", reward]
    return [sys.executable, "-m", "aigiqa_reward", "score", *given, *map(str, options)]


def rows_in(out: Path) -> dict[str, tuple[float | None, str | None]]:
    """Score and error by the image's name; every row must be there once."""
    table = dataset.dataset(sorted(out.glob("part-*.parquet"))).to_table().to_pylist()
    rows = {row["path"].rpartition("::")[2].rpartition("/")[2]: row for row in table}
    assert len(rows) == len(table), f"{len(table) - len(rows)} rows twice"
    return {name: (rows[name]["total"], rows[name]["error"]) for name in sorted(rows)}


def difference(rows: dict[str, Any], expected: dict[str, float | None], most: float) -> str:
    """Check that the images and those without a score are the same; describe the difference of the scores."""
    assert list(rows) == sorted(expected), "rows lost"
    failed = [name for name, total in expected.items() if total is None]
    assert [name for name, row in rows.items() if row[0] is None] == sorted(failed)
    gap = max(abs(rows[name][0] - total) for name, total in expected.items() if total is not None)
    assert gap <= most, gap
    return f"{len(rows)} rows, each once, {len(failed)} with an error, largest difference {gap:.1e}"


def equality(folder: Path, share: float) -> list[str]:
    """Compare the scores of each form with those of `Scorer`."""
    inputs, known, found = written(folder, round(2000 * share)), folder / "scorer.json", []
    if not known.exists():
        from aigiqa_reward import Scorer

        paths = sorted((folder / "images").iterdir())
        totals = Scorer(tiny_reward(folder)).score(list(map(str, paths)), PROMPT, on_error="nan").total.tolist()
        scores = {path.name: total if total == total else None for path, total in zip(paths, totals, strict=True)}
        known.write_text(json.dumps(scores))
    for form, given in inputs.items():
        assert subprocess.run(command(given, folder / form, folder / "reward")).returncode == 1
        found.append(f"{form}: {difference(rows_in(folder / form), json.loads(known.read_text()), 1e-5)}")
    return found


def kills(folder: Path, share: float) -> list[str]:
    """Kill the driver or an actor ten times, at random moments of a run; each run must end with the same rows."""
    inputs, begun = written(folder, round(240 * max(share, 0.1)))["tar"], time.monotonic()
    alone = folder / f"alone-{begun}"
    assert subprocess.run(command(inputs, alone)).returncode == 1
    lasts, expected = time.monotonic() - begun, {name: total for name, (total, _) in rows_in(alone).items()}
    rng, killed, ended, found = random.Random(0), Counter[str](), 0, ""
    while killed.total() < 10:
        out, run = folder / f"killed-{begun}-{ended}", None
        while True:
            run = run or subprocess.Popen(command(inputs, out))
            with suppress(subprocess.TimeoutExpired):
                assert run.wait(rng.uniform(0, lasts)) == 1
                break
            kept = sum(len(file.read_bytes().splitlines()) for file in (out / "unfinished").glob("*.jsonl"))
            kept += sum(map(len, map(parquet.read_table, out.glob("part-*.parquet"))))
            family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            actors = [process for process in family if "MapWorker" in " ".join(process.cmdline())]
            who = "actor" if actors and rng.random() < 0.5 else "driver"
            for process in family if who == "driver" else [rng.choice(actors)]:  # Ray would end a little later
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            killed[who] += 1
            print(f"{who} killed with {kept} of {len(expected)} rows written", flush=True)
            run = run if who == "actor" else run.wait() and None
        ended, found = ended + 1, difference(rows_in(out), expected, 1e-5)
    return [f"{killed['driver']} kills of the driver, {killed['actor']} of an actor, in {ended} runs: {found}"]


def memory(folder: Path, share: float) -> list[str]:
    """Peak memory of the processes that score."""
    peaks, found = [], []
    tiny_reward(folder)
    for count in (round(500 * share), round(5000 * share)):
        inputs = written(folder / str(count), count)["tar"]
        given, peak = command(inputs, folder / f"out-{time.monotonic()}", folder / "reward"), (0, 0)
        run = subprocess.Popen(given)
        while run.poll() is None:
            for process in psutil.Process(run.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if "MapWorker" in " ".join(process.cmdline()):
                        used = process.memory_full_info()
                        peak = max(peak[0], used.rss), max(peak[1], used.uss)
            time.sleep(0.5)
        peaks.append(peak)
        found.append(f"{count} images: peak of an actor {peak[0] >> 20} MiB RSS, {peak[1] >> 20} MiB private")
    return [*found, "ratios {:.3f} RSS, {:.3f} private".format(*(b / a for a, b in zip(*peaks, strict=True)))]


def _plain(paths: list[str], seconds: Any) -> None:
    import torch

    from aigiqa_reward import Scorer, create_reward

    torch.set_num_threads(1)
    scorer = Scorer(create_reward("compact"), BATCH)
    scorer.score(paths[:BATCH], PROMPT)
    begun = time.perf_counter()
    scorer.score(paths, PROMPT)
    seconds.put(time.perf_counter() - begun)


def rate(folder: Path, share: float) -> list[str]:
    """Images per second of two plain processes, and of one and two workers from their first rows on."""
    count = round(400 * max(share, 0.25))  # rows arrive in windows of 4 batches
    inputs = written(folder, count, None, broken=0)["folder"]
    paths = sorted(map(str, (folder / "images").iterdir()))
    seconds: Any = multiprocessing.get_context("spawn").Queue()
    shares = [multiprocessing.get_context("spawn").Process(target=_plain, args=(paths[i::2], seconds)) for i in (0, 1)]
    for process in shares:
        process.start()
    plain = count / max(seconds.get() for _ in shares)
    rates = {}
    for workers in (1, 2):
        out = folder / f"workers-{workers}-{time.monotonic()}"
        cpus = {**os.environ, "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": workers})}
        run, seen = subprocess.Popen(command(inputs, out), env=cpus), list[tuple[float, int]]()
        while run.poll() is None:
            file = next((out / "unfinished").glob("*.jsonl"), None)
            with suppress(FileNotFoundError):  # the shard was finished just now
                rows = file.read_bytes().count(b"\n") if file else 0
                if rows and (not seen or rows > seen[-1][1]):
                    seen.append((time.perf_counter(), rows))
            time.sleep(0.05)
        (start, first), (end, last) = seen[0], seen[-1]
        rates[workers] = (last - first) / (end - start)
    text = f"images per second: two plain processes {plain:.2f}, one worker {rates[1]:.2f}, two workers {rates[2]:.2f}"
    return [f"{text}; two workers: {rates[2] / plain:.2f} of two processes, {rates[2] / rates[1]:.2f} of one worker"]


CHECKS = {check.__name__: check for check in (equality, kills, memory, rate)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help="equality, kills, memory, rate; all by default")
    parser.add_argument("--folder", type=Path, required=True, help="folder for inputs, outputs and results")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images to take")
    given = parser.parse_args()
    for name in given.checks or CHECKS:
        result, begun = given.folder / f"{name}.txt", time.monotonic()
        if not result.exists():
            lines = CHECKS[name](given.folder / name, given.share)
            result.write_text("\n".join([*lines, f"took {time.monotonic() - begun:.0f} s", ""]))
        print(f"{name}:\n{result.read_text()}", flush=True)


if __name__ == "__main__":
    main()

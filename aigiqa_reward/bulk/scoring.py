"""Score shards on Ray Data: tasks read and decode, actors score, and this process commits what is finished."""

from __future__ import annotations

import inspect
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aigiqa_reward import images
from aigiqa_reward.bulk.cluster import RETRIES, TASK, Workers
from aigiqa_reward.bulk.inputs import Files, Item, Shard, Tar
from aigiqa_reward.images.metadata import PromptSource, find_prompt
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.scorer import ScoredImage, Scorer
from aigiqa_reward.utils.io import write_atomically
from aigiqa_reward.utils.run_folder import read_jsonl, reward_identity

if TYPE_CHECKING:
    import pyarrow

    from aigiqa_reward.rewards.reward import Reward

ASPECTS = ("total", "quality", "correspondence")

Build = Callable[[], "Mapping[str, Reward]"]
"""Builds the rewards by name, in each worker."""

PARTS, UNFINISHED = "part-*.parquet", "unfinished"

_BLOCK = 4 * 2**20  # bytes of images that pass from task to task at a time, and are committed together
_WINDOW = 4  # batches that are sorted by size, so that images of one size are scored together
_SAMPLE = 64  # images that a dry run scores


class BulkError(RuntimeError):
    """Scoring cannot continue; what was finished is kept."""


# --------------------------------------------------------------------------------------------- in the workers


@dataclass(frozen=True)
class _Task:
    """A shard, which of its rows are known already, and which are wanted; None for all."""

    index: int
    shard: Shard
    known: frozenset[int]
    wanted: frozenset[int] | None


def _read(row: Mapping[str, Any], prompt: str | None) -> Iterator[dict[str, Any]]:
    """Yield the images of a shard that are not known yet and, after the last one, how many there are in all."""
    task: _Task = row["task"]
    count = 0
    for count, item in enumerate(task.shard.read(), 1):
        if count - 1 not in task.known and (task.wanted is None or count - 1 in task.wanted):
            found = {**item._asdict(), "prompt": prompt or (item.prompt or "").strip() or None}
            yield {"shard": task.index, "row": count - 1, "count": -1, **found}
    yield {"shard": task.index, "row": -1, "count": count, **Item("", None)._asdict()}


def _decode(row: dict[str, Any], prompts_from: PromptSource | None) -> dict[str, Any]:
    """Replace a file's content by pixels, as bytes, and its own prompt if that is asked for.

    Pixels have 8 bits per channel where these hold all of the image.
    """
    data, pixels, shape, narrow, raw = row.pop("data"), b"", (0, 0), True, None
    if row["count"] < 0 and row["error"] is None:
        try:
            if prompts_from is not None:
                own = find_prompt(row["path"], prompts_from, data)
                row["prompt"], raw = own.text, own.raw
            image = images.decode(data, row["path"])
        except (ValueError, TypeError) as error:
            row["error"] = str(error)
        else:
            levels = (image * 255).round().to(torch.uint8)
            narrow = torch.equal(levels.float() / 255, image)
            pixels, shape = (levels if narrow else image).numpy().tobytes(), image.shape[1:]
    shown = {"pixels": pixels, "height": shape[0], "width": shape[1], "narrow": narrow}
    return {**row, "raw_prompt": raw, **shown}


def _image(row: Mapping[str, Any]) -> torch.Tensor:
    dtype = torch.uint8 if row["narrow"] else torch.float32
    return torch.frombuffer(bytearray(row["pixels"]), dtype=dtype).reshape(3, row["height"], row["width"])


class _Scoring:
    """An actor: scores batches of rows by all rewards."""

    def __init__(self, build: Build, batch_size: int, details: Sequence[str], workers: Workers) -> None:
        workers.enter()
        self.rewards, self.details = build(), details
        self.scorers = [Scorer(reward, batch_size) for reward in self.rewards.values()]

    def __call__(self, batch: pyarrow.Table) -> dict[str, list[Any]]:
        """Return the records of a batch as JSON; what would fail for every batch is one as well."""
        rows = batch.to_pylist()
        try:
            records = self.records(rows)
        except Exception as error:  # Ray would lose it among the errors of killed tasks, which are tried again
            reason = f"a worker failed: {type(error).__name__}: {error}"
            reason += "; lower --batch-size" if "memory" in reason.lower() else ""
            return {"shard": [-1], "row": [-1], "count": [-1], "record": [json.dumps({"failure": reason})]}
        texts = [json.dumps(records.get(place)) for place in range(len(rows))]
        return {**{name: [row[name] for row in rows] for name in ("shard", "row", "count")}, "record": texts}

    def records(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """Return the records of the images among the rows by place."""
        known = {i: _failed(row, row["error"]) for i, row in enumerate(rows) if row["count"] < 0 and row["error"]}
        left = [i for i, row in enumerate(rows) if row["count"] < 0 and i not in known]
        left.sort(key=lambda i: (rows[i]["height"], rows[i]["width"]))
        for places in ([i for i in left if rows[i]["prompt"]], [i for i in left if not rows[i]["prompt"]]):
            known |= self._scored({i: rows[i] for i in places})
        return known

    def _scored(self, rows: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """Score rows that have a prompt all, or none of them."""
        if not rows:
            return {}
        prompts = [row["prompt"] for row in rows.values() if row["prompt"]] or None
        needy = next((name for name, reward in self.rewards.items() if prompts is None and reward.needs_prompts), None)
        if needy is not None:
            return {i: _failed(row, f"no prompt, which {needy} needs") for i, row in rows.items()}
        sources = [_image(row) for row in rows.values()]
        streams = [scorer.stream(sources, prompts) for scorer in self.scorers]
        try:
            found = list(zip(*streams, strict=True))
        except (ValueError, TypeError) as error:  # of one of the prompts
            if len(rows) == 1:
                return {i: _failed(row, str(error)) for i, row in rows.items()}
            return {place: each for i, row in rows.items() for place, each in self._scored({i: row}).items()}
        return {i: self._record(row, each) for (i, row), each in zip(rows.items(), found, strict=True)}

    def _record(self, row: Mapping[str, Any], found: Sequence[ScoredImage]) -> dict[str, Any]:
        record = {name: row[name] for name in ("path", "prompt", "raw_prompt", "error")}
        for name, each in zip(self.rewards, found, strict=True):
            if each.output is None:
                return _failed(row, str(each.error))
            prefix = f"{name}." if len(found) > 1 else ""
            for aspect in ASPECTS:
                scores = getattr(each.output, aspect)
                record[prefix + aspect] = None if scores is None else scores.item()
                if scores is not None and not math.isfinite(scores.item()):
                    return _failed(row, f"the reward gave {scores.item()}")
            for detail, value in each.output.details.items():
                if detail in self.details or prefix + detail in self.details:
                    record[prefix + detail] = value[0].tolist()
        return record


def _failed(row: Mapping[str, Any], error: str) -> dict[str, Any]:
    return {"path": row["path"], "prompt": row["prompt"], "raw_prompt": row.get("raw_prompt"), "error": error}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a worker found about the rewards, and about a sample of the images.

    Attributes:
        identity: what identifies each reward, by name.
        details: number of dimensions of each detail of an image, by column.
        decoding: seconds per image.
        scoring: seconds per image, by all rewards.
        size: mean bytes of an image file.
    """

    identity: dict[str, str]
    details: dict[str, int]
    decoding: float = math.nan
    scoring: float = math.nan
    size: float = math.nan


def probe(
    build: Build,
    shards: Sequence[Shard],
    prompt: str | None,
    prompts_from: PromptSource | None,
    batch_size: int,
    workers: Workers,
) -> Probe:
    """Build the rewards and score a gray image; with shards, time a sample of their images."""
    workers.enter()
    rewards, details = build(), {}
    for name, reward in rewards.items():
        output = BoundReward(reward).score(torch.full((1, 3, 64, 64), 0.5), ["a photograph"])
        prefix = f"{name}." if len(rewards) > 1 else ""
        details |= {prefix + detail: value.ndim - 1 for detail, value in output.details.items()}
    found = Probe(identity={name: reward_identity(reward) for name, reward in rewards.items()}, details=details)
    each = math.ceil(_SAMPLE / max(1, len(shards)))
    items = [item for shard in shards for item in islice(shard.read(), each)]
    if not items:
        return found
    started = time.perf_counter()
    read = [{"count": -1, **item._asdict(), "prompt": prompt or item.prompt} for item in items]
    rows = [_decode(row, prompts_from) for row in read]
    decoded = time.perf_counter()
    scoring = _Scoring(lambda: rewards, batch_size, (), workers)
    scoring.records(rows[:batch_size])  # the first batch is slower
    warm = time.perf_counter()
    scoring.records(rows)
    times = {"decoding": (decoded - started) / len(rows), "scoring": (time.perf_counter() - warm) / len(rows)}
    return Probe(identity=found.identity, details=details, **times, size=sum(len(i.data) for i in items) / len(items))


# --------------------------------------------------------------------------------------------- results


def table_schema(rewards: Sequence[str], details: Mapping[str, int], *, raw_prompt: bool = False) -> pyarrow.Schema:
    """Return the columns of every file of results; `details` are numbers of dimensions by column."""
    import pyarrow as pa

    def nested(dimensions: int) -> pa.DataType:
        return pa.list_(nested(dimensions - 1)) if dimensions else pa.float32()

    names = [f"{name}.{aspect}" for name in rewards for aspect in ASPECTS] if len(rewards) > 1 else ASPECTS
    scores = [*((name, pa.float32()) for name in names), *((name, nested(depth)) for name, depth in details.items())]
    texts = ["path", "prompt", *["raw_prompt"] * raw_prompt]
    return pa.schema([*((name, pa.string()) for name in texts), *scores, ("error", pa.string())])


@dataclass
class Results:
    """A folder with part-NNNNNN.parquet of each finished shard and, of the others, the rows so far as JSON Lines.

    A part appears at once, with all rows of its shard in their order; this process alone writes.
    """

    path: Path
    schema: pyarrow.Schema
    rows: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)

    def part(self, shard: int) -> Path:
        """Return the file of a finished shard."""
        return self.path / f"part-{shard:06d}.parquet"

    def _unfinished(self, shard: int) -> Path:
        return self.path / UNFINISHED / f"{shard:06d}.jsonl"

    def resume(self) -> None:
        """Find the finished shards, and read the rows of the others."""
        self.finished = {int(file.stem.removeprefix("part-")) for file in self.path.glob(PARTS)}
        for file in (self.path / UNFINISHED).glob("*.jsonl"):
            shard = int(file.stem)
            if shard in self.finished:
                file.unlink()
            else:
                self.rows[shard] = dict(read_jsonl(file.read_bytes()))
                write_atomically(file, b"".join(_line(row) for row in self.rows[shard].items()))  # whole lines only

    def add(self, shard: int, rows: Mapping[int, dict[str, Any]]) -> None:
        """Keep rows of a shard; after a retry of Ray's they may come twice."""
        if shard in self.finished:
            return
        self._unfinished(shard).parent.mkdir(parents=True, exist_ok=True)
        with self._unfinished(shard).open("ab") as file:
            file.write(b"".join(map(_line, rows.items())))
        self.rows.setdefault(shard, {}).update(rows)
        self._finish(shard)

    def end(self, shard: int, count: int) -> None:
        """Note how many rows a shard has."""
        self.counts[shard] = count
        self._finish(shard)

    def missing(self, shard: int) -> list[int]:
        """Return the rows of a shard of known length that did not arrive."""
        return [row for row in range(self.counts[shard]) if row not in self.rows.get(shard, {})]

    def _finish(self, shard: int) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        rows = self.rows.get(shard, {})
        if len(rows) != self.counts.get(shard):
            return
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist([rows[row] for row in sorted(rows)], schema=self.schema), sink)
        write_atomically(self.part(shard), sink.getvalue().to_pybytes())
        self._unfinished(shard).unlink(missing_ok=True)
        self.rows.pop(shard, None)
        self.finished.add(shard)


def _line(row: tuple[int, dict[str, Any]]) -> bytes:
    return json.dumps(row).encode() + b"\n"


# --------------------------------------------------------------------------------------------- the driver


@dataclass(kw_only=True)
class BulkScoring:
    """A run of scoring; `run` starts or resumes it, and calls `progress` with rows, errors and the share done."""

    ray: Any
    workers: Workers
    shards: Sequence[Shard]
    results: Results
    build: Build
    prompt: str | None
    prompts_from: PromptSource | None
    batch_size: int
    details: Sequence[str]
    progress: Callable[[int, int, float], object]
    rows: int = 0
    errors: int = 0
    _share: Callable[[], float] = field(init=False)

    def run(self) -> None:
        """Score what is not finished.

        A task or worker that is killed is tried twice more; the images that it held are then tried one by one, and
        those that kill again become rows with an error.

        Raises:
            BulkError: a worker failed, or shards could not be read; what was finished is kept.
        """
        self.results.resume()
        finished = self.results.finished
        todo = [index for index in range(len(self.shards)) if index not in finished]
        expected = estimated_rows([self.shards[index] for index in todo]) - sum(map(len, self.results.rows.values()))
        if math.isnan(expected):  # tars
            self._share = lambda: 1 - len({*todo} - finished) / len(todo)
        else:
            self._share = lambda: min(1.0, self.rows / max(1.0, expected))
        self._stream([self._task(index) for index in todo])
        lost = [index for index in todo if index not in finished]
        again = [self._task(i, self.results.missing(i) if i in self.results.counts else None) for i in lost]
        self._stream(again, one_by_one=True)
        for index in lost:
            if index in self.results.counts and index not in finished:
                self._give_up(index, self.results.missing(index))
        if unread := [self.shards[index] for index in lost if index not in self.results.counts]:
            text = f"{len(unread)} of {len(self.shards)} shards could not be read, the first is {_name(unread[0])}"
            raise BulkError(f"{text}; Ray's log says why. The same command tries them again")

    def _task(self, index: int, wanted: Iterable[int] | None = None) -> dict[str, Any]:
        known: Set[int] = self.results.rows.get(index, {}).keys()
        chosen = None if wanted is None else frozenset(wanted)
        return {"task": _Task(index, self.shards[index], frozenset(known), chosen)}

    def _stream(self, tasks: Sequence[dict[str, Any]], *, one_by_one: bool = False) -> None:
        """Score tasks and commit their rows as they arrive."""
        if not tasks:
            return
        data, context = self.ray.data, self.ray.data.DataContext.get_current()
        context.max_errored_blocks = -1  # of killed tasks; their rows are missing afterwards
        # Blocks of one row each by their size: Ray's repartition takes a whole CPU, which may never be free.
        context.target_max_block_size, context.enable_progress_bars = 1 if one_by_one else _BLOCK, False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        decoding = self.workers.decoding - 0.001  # another share than reading's, so that Ray keeps two stages
        rows = data.from_items(list(tasks), override_num_blocks=len(tasks))
        rows = rows.flat_map(
            _read, fn_kwargs={"prompt": self.prompt}, num_cpus=TASK, **_limits(rows.flat_map, max_retries=RETRIES)
        )
        rows = rows.map(
            _decode,
            fn_kwargs={"prompts_from": self.prompts_from},
            num_cpus=decoding,
            **_limits(rows.map, max_retries=RETRIES),
        )
        scored = rows.map_batches(
            _Scoring,
            fn_constructor_args=(self.build, self.batch_size, tuple(self.details), self.workers),
            batch_size=1 if one_by_one else _WINDOW * self.batch_size,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=self.workers.count),
            **_limits(rows.map_batches, max_restarts=RETRIES, max_task_retries=RETRIES),
            **self.workers.resources,
        )
        for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            self._commit(batch.to_pylist())

    def _commit(self, rows: Sequence[Mapping[str, Any]]) -> None:
        found: dict[int, dict[int, dict[str, Any]]] = {}
        for row in rows:
            record = json.loads(row["record"])
            if record is None:
                self.results.end(row["shard"], row["count"])
            elif "failure" in record:
                raise BulkError(f"{record['failure']}. The same command continues from what is finished")
            else:
                found.setdefault(row["shard"], {})[row["row"]] = record
        for shard, records in found.items():
            self.results.add(shard, records)
            self.rows += len(records)
            self.errors += sum(record["error"] is not None for record in records.values())
        self.progress(self.rows, self.errors, self._share())

    def _give_up(self, index: int, rows: Sequence[int]) -> None:
        failed = {}
        for row, item in enumerate(self.shards[index].read()):
            if row in set(rows):
                text = f"{item.path}: the process that decoded or scored it was killed each time"
                failed[row] = _failed({"path": item.path, "prompt": self.prompt or item.prompt}, text)
        self.results.add(index, failed)


def _limits(method: Callable[..., Any], **limits: int) -> dict[str, Any]:
    """Limits of retries, which Ray takes until 2.64; after that its own hold."""
    more = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(method).parameters.values())
    return limits if more else {}


def _name(shard: Shard) -> str:
    return f"the list from {shard.entries[0][0]} on" if isinstance(shard, Files) else shard.url


def estimated_rows(shards: Sequence[Shard], size: float = math.nan) -> float:
    """Return the number of images; that of tars by the mean size of a file, NaN without one."""
    return sum(shard.size / (size + 1024) if isinstance(shard, Tar) else shard.rows for shard in shards)

"""Damaged and made-up files, on which a reader may succeed or raise a clear error that names the file.

A `Target` is a reader, the files that it reads, and the exceptions that are its clear errors. `attack` runs it on many
damaged files and checks each run: no other exception, nothing written outside its folder, bounded time and memory.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SECONDS = 20
MEMORY = 1_500_000_000
# fmt: off
NAMES = (
    "../escaped", "/tmp/absolute-escaped", "two\nlines", "-rf", "a" * 300, "ünïcödé-\u202e-名前", "$(touch escaped)",
    "nul\0byte", " ", "", "half \ud800 of a character", "con.png", "{0.__class__}", "%s%n",
)
# fmt: on


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


Damage = Callable[[bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    files: Mapping[str, bytes]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = (ValueError, TypeError, OSError)
    named: str | None = None
    kept: frozenset[str] = field(default_factory=frozenset)


def cut(data: bytes, place: float) -> bytes:
    return data[: int(place * len(data))]


def flipped(data: bytes, changes: list[tuple[float, int]]) -> bytes:
    changed = bytearray(data)
    for place, value in changes:
        if changed:
            changed[int(place * (len(changed) - 1))] = value
    return bytes(changed)


def spliced(data: bytes, place: float, inserted: bytes, dropped: int) -> bytes:
    at = int(place * len(data))
    return data[:at] + inserted + data[at + dropped :]


PLACES = st.floats(0, 1, exclude_max=True)
TEXTS = st.sampled_from(NAMES) | st.text(max_size=40)
INSERTED = (
    st.binary(max_size=64)
    | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from([b"'", b",", b"\n", b"\r", b"- ", b": ", b"&a [*a]", b"<", b"__metadata__", b"\xef\xbb\xbf"])
    | st.sampled_from(
        (b"\0" * 100, b"9" * 400, b"1e999", b"NaN", b"-1", b"null", b"[" * 60_000, b'{"a":' * 60_000, b"\xff\xfe", b'"')
    )
)
DAMAGES: st.SearchStrategy[Damage] = st.one_of(
    st.builds(lambda place: lambda data: cut(data, place), PLACES),
    st.builds(
        lambda changes: lambda data: flipped(data, changes),
        st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=12),
    ),
    st.builds(
        lambda place, inserted, dropped: lambda data: spliced(data, place, inserted, dropped),
        PLACES,
        INSERTED,
        st.integers(0, 40),
    ),
    st.builds(
        lambda encoding: lambda data: data.decode("latin-1").encode(encoding), st.sampled_from(["utf-16", "cp037"])
    ),
    st.builds(lambda other: lambda _data: other, INSERTED),
    st.builds(lambda times: lambda data: data * times, st.integers(2, 4)),
)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(),
    st.sampled_from([10**9, -(10**9), 2**63, 10**400, float("nan"), float("inf"), -1, 0]), st.floats(), TEXTS,
)  # fmt: skip
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(TEXTS, SCALARS, max_size=2)


@st.composite
def rewritten(draw: st.DrawFn) -> Damage:
    turns = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 2), TEXTS, VALUES), max_size=3))

    def damage(data: bytes) -> bytes:
        try:
            root = json.loads(data)
        except ValueError:
            return data
        for place, kind, name, value in turns:
            spots = list(_spots(root))
            if not spots:
                return json.dumps(value).encode("utf-8", "surrogatepass")
            holder, key = spots[int(place * len(spots))]
            if kind == 0:
                holder[key] = value
            elif kind == 1:
                del holder[key]
            elif isinstance(holder, dict):
                holder[name] = value
            else:
                holder.append(value)
        return json.dumps(root).encode("utf-8", "surrogatepass")

    return damage


def _spots(node: Any) -> list[tuple[Any, Any]]:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [spot for key in keys for spot in [(node, key), *_spots(node[key])]]


def attack(target: Target, home: Path, cases: int, *, repeatable: bool) -> None:
    """Run a reader on `cases` damaged files in an empty folder, on the same ones at every call if `repeatable`."""
    folder, elsewhere = home / "folder", home / "elsewhere"
    elsewhere.mkdir(parents=True)
    attacked = sorted(target.files.keys() - target.kept)

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=repeatable,
        phases=(Phase.generate,) if repeatable else (Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(name=st.sampled_from(attacked), damage=DAMAGES | rewritten())
    def run(name: str, damage: Damage) -> None:
        lay(target, folder, {name: damage(target.files[name])})
        hold(target, folder, name, elsewhere)

    before = Path.cwd()
    os.chdir(elsewhere)
    try:
        run()
    finally:
        os.chdir(before)


def lay(target: Target, folder: Path, other: Mapping[str, bytes] | None = None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in {**target.files, **(other or {})}.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def hold(target: Target, folder: Path, name: str, elsewhere: Path) -> BaseException | None:
    spent, held = resource.getrusage(resource.RUSAGE_SELF).ru_utime, peak()
    raised = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder)
    except target.errors as error:
        raised = error
        wanted = name if target.named is None else target.named
        assert Path(wanted).name in str(error), f"which file? {type(error).__name__}: {error}"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - spent < SECONDS
    assert peak() - held < MEMORY
    assert not any(elsewhere.iterdir())
    assert {entry.name for entry in folder.parent.iterdir()} <= {folder.name, elsewhere.name}
    return raised


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

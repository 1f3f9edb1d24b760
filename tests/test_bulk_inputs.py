"""Images of folders, tables and tars at URLs of fsspec, shard by shard, and what cannot be read."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from aigiqa_reward.bulk.inputs import Item, find_shards

FOLDER = "memory:///bulk"
PICTURES = {f"{i}.png": bytes([i]) * (i + 1) for i in range(4)}
"""Names and contents; nothing here decodes them."""


@pytest.fixture(autouse=True)
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.pipe({f"/bulk/{name}": data for name, data in PICTURES.items()})
    yield fs
    fs.store.clear()


def write(name: str, data: bytes) -> str:
    fsspec.filesystem("memory").pipe(f"/bulk/{name}", data)
    return f"{FOLDER}/{name}"


def table(**columns: object) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink, row_group_size=2)
    return sink.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as file:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


def items(*inputs: str, **options: object) -> list[Item]:
    shards, _ = find_shards(inputs, **options)  # pyright: ignore[reportArgumentType]
    assert all(shard.rows in (None, len(list(shard.read()))) for shard in shards)
    return [item for shard in shards for item in shard.read()]


@pytest.mark.parametrize("given", [FOLDER, f"{FOLDER}/*.png"])
def test_a_folder_and_a_glob_give_their_images_in_order(given: str) -> None:
    write("notes.md", b"no image")
    write("below/5.png", b"5")
    assert [(item.path, item.data) for item in items(given)] == [(f"{FOLDER}/{n}", d) for n, d in PICTURES.items()]


def test_subfolders_are_searched_on_request() -> None:
    write("below/5.png", b"5")
    assert len(items(FOLDER, recursive=True)) == len(PICTURES) + 1


def test_a_table_of_bytes_names_its_rows_across_row_groups() -> None:
    url = write("a.parquet", table(image=list(PICTURES.values()), caption=["a", "b", None, "d"]))
    found = items(url)
    assert [item.path for item in found] == [f"{url}::{row}" for row in range(4)]
    assert [item.data for item in found] == list(PICTURES.values())
    assert [item.prompt for item in found] == ["a", "b", None, "d"]


def test_a_table_of_the_datasets_library_holds_bytes_or_paths() -> None:
    cells = [{"bytes": b"1", "path": "one.png"}, {"bytes": None, "path": "1.png"}, {"bytes": None, "path": None}]
    found = items(write("a.parquet", table(image=cells)))
    assert [(item.path, item.data) for item in found[:2]] == [("one.png", b"1"), (f"{FOLDER}/1.png", PICTURES["1.png"])]
    assert found[2].error is not None and "no image in column image" in found[2].error


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_paths_in_tables_are_relative_to_the_table(kind: str) -> None:
    rows = [{"path": "1.png", "prompt": "one"}, {"path": f"{FOLDER}/2.png", "prompt": "two"}, {"path": "9.png"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    columns = {name: [row.get(name) for row in rows] for name in ("path", "prompt")}
    found = items(write(f"a.{kind}", table(**columns) if kind == "parquet" else lines))
    assert [(item.path, item.prompt, item.data) for item in found[:2]] == [
        (f"{FOLDER}/1.png", "one", PICTURES["1.png"]),
        (f"{FOLDER}/2.png", "two", PICTURES["2.png"]),
    ]
    assert found[2].error == f"{FOLDER}/9.png: no such file"


def test_a_tar_gives_images_with_the_prompts_beside_them() -> None:
    beside = {"0.txt": b"zero", "1.json": b'{"caption": "one", "own": "1"}', "3.txt": b"three", "4.cls": b"4"}
    url = write("a.tar", tar(dict(sorted({**PICTURES, **beside}.items()))))
    assert [(item.path, item.prompt) for item in items(url)] == [
        (f"{url}::0.png", "zero"), (f"{url}::1.png", "one"), (f"{url}::2.png", None), (f"{url}::3.png", "three"),
    ]  # fmt: skip
    assert [item.prompt for item in items(url, prompt_column="own")] == [None, "1", None, None]


def test_what_follows_damage_in_a_tar_is_an_error() -> None:
    whole = tar({"0.png": b"0" * 600, "1.png": b"1" * 600})
    *read, last = items(write("a.tar", whole[:2300]))
    assert [item.data for item in read] == [b"0" * 600]
    assert last.error is not None and "cannot be read further" in last.error


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("memory://nowhere", {}, "images: cannot read memory://nowhere: no such file or folder"),
        ("nonsense://x", {}, "images: cannot read nonsense://x: Protocol not known: nonsense"),
        (f"{FOLDER}/a.parquet", {"image_column": "picture"}, "no column picture"),
        (f"{FOLDER}/a.parquet", {"prompt_column": "words"}, "no column words"),
        (f"{FOLDER}/empty.parquet", {}, "with at least one row, got none"),
        (f"{FOLDER}/broken.parquet", {}, "images: cannot read memory:///bulk/broken.parquet"),
        (f"{FOLDER}/broken.jsonl", {}, "images: cannot read memory:///bulk/broken.jsonl"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_scored(
    given: str, options: dict[str, str], message: str
) -> None:
    write("a.parquet", table(image=[b"0"]))
    write("empty.parquet", table(image=pa.array([], pa.binary())))
    write("broken.parquet", b"PAR1")
    write("broken.jsonl", b"[1]\n")
    with pytest.raises(ValueError) as raised:
        find_shards([given], **options)  # pyright: ignore[reportArgumentType]
    assert message in str(raised.value)


@pytest.mark.parametrize("place", ["auto", "sidecar"])
def test_sidecars_are_beside_local_files(place: str) -> None:
    for name, data in {"a.parquet": table(image=[b"0"]), "a.tar": tar({"0.png": b"0"})}.items():
        url = write(name, data)
        with pytest.raises(ValueError, match=f"prompts_from: '{place}' looks beside local image files, got {url}; use"):
            find_shards([url], prompts_from=place)  # pyright: ignore[reportArgumentType]
        assert items(url, prompts_from="embedded")
    with pytest.raises(ValueError, match=r"prompts_from: '.*' looks beside local image files, got memory://"):
        find_shards([f"{FOLDER}/0.png"], prompts_from=place)  # pyright: ignore[reportArgumentType]


def test_prompts_are_in_tables_or_in_files() -> None:
    listed = write("metadata.jsonl", b'{"file_name": "0.png", "text": "zero"}')
    for place in (None, "embedded"):  # a folder's images are read once
        assert [item.path for item in items(FOLDER, prompts_from=place)] == [f"{FOLDER}/{n}" for n in PICTURES]
    assert [(item.path, item.prompt) for item in items(listed)] == [(f"{FOLDER}/0.png", "zero")]
    for url in (listed, write("a.parquet", table(image=[b"0"], caption=["zero"]))):
        with pytest.raises(ValueError, match=r"prompts_from: a table gives the prompts of .* already; leave it out"):
            find_shards([url], prompts_from="embedded")


def test_the_identity_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"0")
    _, before = find_shards([str(tmp_path)])
    (tmp_path / "0.png").write_bytes(b"00")
    assert find_shards([str(tmp_path)])[1] != before

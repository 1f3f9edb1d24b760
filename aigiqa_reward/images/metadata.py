"""The prompt of an image: what its generator wrote into the file, or a sidecar. Nothing in either is executed."""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeAlias

from aigiqa_reward.images.comfyui import prompts_of
from aigiqa_reward.images.layout import ImageError
from aigiqa_reward.images.loading import existing_file
from aigiqa_reward.utils.checks import lone_surrogate
from aigiqa_reward.utils.io import PROMPTS, parse_json, read_regular

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_TEXT = 2**24
"""Bytes of text, unpacked, that are read from one file."""

_TOO_LONG = f"more than {MAX_TEXT // 2**20} MiB of text"
_MAX_PARTS, _MAX_VALUES = 1_000_000, 1_000_000  # parts of a file; values and containers of a JSON text

PromptSource: TypeAlias = Literal["auto", "embedded", "sidecar"]
"""Where a prompt is looked for: in the file, in a text beside it, or (auto) beside it first."""


@dataclass(frozen=True)
class Prompt:
    """The prompt of an image.

    Attributes:
        text: what a reward reads: without attention weights, LoRA tags, BREAK and embeddings.
        raw: what the file says.
        negative: negative prompt as the file says it; None without one.
        source: "embedded" or "sidecar".

    Example:
        >>> from aigiqa_reward.images import Prompt
        >>> Prompt(text="a red fox", raw="a (red:1.2) fox", negative=None, source="embedded").text
        'a red fox'
    """

    text: str
    raw: str
    negative: str | None
    source: str


class _Found(NamedTuple):
    """A prompt and a negative one as a program wrote them, and a pattern of what it does not read as text."""

    raw: str
    negative: str | None = None
    marks: str = ""


def read_prompt(path: str | os.PathLike[str], source: PromptSource = "auto") -> Prompt | None:
    r"""Read the prompt that an image was made from; None where there is none, or an empty one.

    Embedded are the texts of PNG files and the EXIF data of JPEG and WebP files as AUTOMATIC1111, Forge, ComfyUI,
    InvokeAI, Fooocus and NovelAI write them; of a ComfyUI graph, the text that reaches the positive input of its
    samplers. Sidecars are NAME.txt and NAME.caption, and metadata.jsonl in the same folder, with the columns file_name
    and prompt, caption or text.

    Args:
        path: image file.
        source: "embedded", "sidecar", or "auto" for the sidecar if there is one, else the file.

    Raises:
        ImageError: no such file; several different prompts; more than 16 MiB of text; damaged texts; or a text that a
            node of ComfyUI made when it ran.

    Example:
        >>> from PIL import Image
        >>> from PIL.PngImagePlugin import PngInfo
        >>> from aigiqa_reward.images import PromptSource, read_prompt
        >>> info = PngInfo()
        >>> info.add_text("parameters", "a (red:1.2) fox <lora:fur:.8>\nSteps: 20, Sampler: Euler a, Seed: 3")
        >>> Image.new("RGB", (64, 64)).save("fox.png", pnginfo=info)
        >>> place: PromptSource = "embedded"
        >>> read_prompt("fox.png", place)
        Prompt(text='a red fox', raw='a (red:1.2) fox <lora:fur:.8>', negative=None, source='embedded')
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected the path of an image file, got {type(path).__name__}; save the image first")
    check_source("source", source)
    return _read(os.fsdecode(path), source)


def _read(name: str, source: PromptSource, data: bytes | None = None) -> Prompt | None:
    """Read as `read_prompt` does; `data` is the content of a file that was read already."""
    file = existing_file(name) if data is None else Path(name)
    readers: dict[str, Callable[[], _Found | None]]
    readers = {"sidecar": lambda: _sidecar(file), "embedded": lambda: _embedded(file, data)}
    for place in (source,) if source != "auto" else readers:
        try:
            found = readers[place]()
            text = "" if found is None else _cleaned(found)
            if fault := lone_surrogate(text):
                raise ValueError(f"it {fault}")
        except Exception as error:  # Pillow, zlib and made-up values raise what they like
            reason = f"damaged texts ({error})"
            if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
                reason = str(error)
            elif isinstance(error, OSError) and error.filename:
                reason = f"{Path(error.filename).name}: {error.strerror}"
            raise ImageError(f"{name}: its prompt cannot be read: {reason}") from error
        if found is not None and text:
            return Prompt(text, found.raw.strip(), (found.negative or "").strip() or None, place)
    return None


def check_source(argument: str, source: str) -> None:
    """Refuse a place of prompts that there is not; `argument` is its name in the error."""
    if source not in ("auto", "embedded", "sidecar"):
        raise ValueError(f"{argument}: expected 'auto', 'embedded' or 'sidecar', got {source!r}")


def find_prompt(path: str | os.PathLike[str], source: PromptSource, data: bytes | None = None) -> Prompt:
    """Read the prompt that an image was made from; an ImageError also where there is none.

    `data` is the content of a file that was read already; with "embedded" there need not be one at `path`.
    """
    name = os.fsdecode(path)
    if (found := _read(name, source, data)) is None:
        where = {"auto": "in it or beside it", "embedded": "in it", "sidecar": "beside it"}[source]
        raise ImageError(f"{name}: there is no prompt {where}")
    return found


def png(image: Image, prompt: str, *, seed: int | None, scheduler: object = None, call: Mapping[str, Any]) -> bytes:
    """Return a PNG file with `parameters` for AUTOMATIC1111's readers, from the arguments of a pipeline's `call`.

    Brackets of the prompt are escaped: diffusers reads them as text, those readers as weights. `seed` is None where
    none makes the image again.
    """
    from PIL.PngImagePlugin import PngInfo

    settings: dict[str, object] = {
        "Steps": call.get("num_inference_steps"),
        "Sampler": None if scheduler is None else type(scheduler).__name__,
        "CFG scale": call.get("guidance_scale"),
        "Seed": seed,
        "Size": f"{image.width}x{image.height}",
        "Version": "aigiqa-reward",  # readers want three settings at least
    }
    negative = call.get("negative_prompt")
    texts = [prompt, *([f"Negative prompt: {negative}"] if isinstance(negative, str) and negative else [])]
    lines = [re.sub(r"([\\()\[\]])", r"\\\1", text) for text in texts]
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    info, data = PngInfo(), io.BytesIO()
    info.add_text("parameters", "\n".join(lines))
    image.save(data, format="PNG", pnginfo=info)
    return data.getvalue()


# --------------------------------------------------------------------------------------------- what a reward reads

_NOVELAI = r"[{}]|(?<![\d.])-?[\d.]+::|::"  # {word}, 1.2::word::
_INVOKEAI = r"(?<=\))[\d.]+|(?<=[\w)])[+-]+(?![\w+-])"  # (word)1.2, word++
_DROPPED = r"<[\w.-]+(?::[^<>]*)?>|\bembedding:[^\s,():\[\]]+|\bBREAK\b"  # no pattern here is slower than linear


def _cleaned(found: _Found) -> str:
    text = re.sub(found.marks, "", re.sub(_DROPPED, " ", found.raw))
    text = re.sub(r"\[[^\[\]:|]*:([^\[\]:|]*):\s*[\d.]+\s*\]", r"\1", text)  # [from:to:when]
    weights = r"\\([()\[\]\\])|:\s*[+-]?[\d.]+\s*(?=[)\]])|[()\[\]]"
    text = " ".join(re.sub(weights, lambda match: match[1] or "", text).split())
    return re.sub(r" ?,(?: ?,)*", ",", text).strip(" ,")


# --------------------------------------------------------------------------------------------- texts in files


def _embedded(file: Path, data: bytes | None) -> _Found | None:
    with file.open("rb") if data is None else io.BytesIO(data) as opened:
        texts = _by_key(_texts(opened))
    readers = {"parameters": _parameters, "prompt": _comfyui, "invokeai_metadata": _invokeai}
    readers |= dict.fromkeys(("sd-metadata", "Dream"), _early_invokeai)
    for key, read in readers.items():
        if key in texts and (found := read(texts[key])) is not None and found.raw.strip():
            return found
    return _novelai(texts) if texts.get("Software", "").startswith("NovelAI") else None


_KEYS = ("parameters", "prompt", "invokeai_metadata", "sd-metadata", "Dream", "Software", "Description", "Comment")


def _by_key(texts: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, text in texts:
        if key in _KEYS and found.setdefault(key, text) != text:
            raise ValueError(f"the file has several different texts {key}")
    return found


def _texts(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Yield keys and texts of a PNG, JPEG or WebP file, within bounds; pixels are skipped."""
    start = file.read(12)
    form = "PNG" if start[:8] == b"\x89PNG\r\n\x1a\n" else "JPEG" if start[:2] == b"\xff\xd8" else "WEBP"
    if form == "WEBP" and (start[:4], start[8:]) != (b"RIFF", b"WEBP"):
        return
    file.seek({"PNG": 8, "JPEG": 2, "WEBP": 12}[form])
    left, exif = MAX_TEXT, b""
    for _ in range(_MAX_PARTS):
        kind, length, after = _part(file, form)
        if kind in (b"", b"\xda"):  # the end, or a JPEG's pixels
            yield from _exif(exif) if exif else ()
            return
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"\xe1", b"EXIF"):
            file.seek(length + after, os.SEEK_CUR)
            continue
        if length > left:
            raise ValueError(_TOO_LONG)
        data = file.read(length)
        if kind in (b"eXIf", b"EXIF") or data[:6] == b"Exif\0\0":
            exif += data.removeprefix(b"Exif\0\0")
        elif kind != b"\xe1":  # XMP
            key, data = _unpacked(kind, data, left)
            yield key, _decoded(data)
        left -= max(length, len(data))
        file.seek(after, os.SEEK_CUR)
    raise ValueError(f"more than {_MAX_PARTS:,} parts")


def _part(file: BinaryIO, form: str) -> tuple[bytes, int, int]:
    """Read a header: the kind of a part, its length, and the bytes after it; no kind at the end."""
    head = file.read(4 if form == "JPEG" else 8)
    if form == "JPEG":
        return head[1:2] if len(head) == 4 else b"", max(int.from_bytes(head[2:]) - 2, 0), 0
    kind, length = (head[4:], head[:4]) if form == "PNG" else (head[:4], head[7:3:-1])
    size = int.from_bytes(length)
    return kind if len(head) == 8 else b"", size, 4 if form == "PNG" else size % 2


def _unpacked(kind: bytes, data: bytes, left: int) -> tuple[str, bytes]:
    key, _, rest = data.partition(b"\0")
    packed, text = kind == b"zTXt", rest[1:] if kind == b"zTXt" else rest
    if kind == b"iTXt":  # packed or not, the method, the language, the translated key
        packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[2]
    if packed:
        inflate = zlib.decompressobj()
        text = inflate.decompress(text, left + 1)
        if not inflate.eof or len(text) > left:
            raise ValueError(_TOO_LONG if len(text) > left else "a packed text is cut off")
    return key.decode("latin-1"), text


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _exif(data: bytes) -> Iterator[tuple[str, str]]:
    from PIL.Image import Exif

    exif = Exif()
    exif.load(data)
    for value in (exif.get_ifd(0x8769).get(0x9286), exif.get(0x9286)):  # UserComment; the second is Fooocus's place
        text = _comment(value) if isinstance(value, bytes) else str(value or "")
        if text.startswith('{"') or "Steps: " in text:  # and no photographer's comment
            yield "parameters", text
    for tag in (0x010E, 0x010F, 0x0110):  # ComfyUI's
        if isinstance(value := exif.get(tag), str) and value.startswith("prompt:"):
            yield "prompt", value.removeprefix("prompt:")


def _comment(value: bytes) -> str:
    """Decode a UserComment; in which order the two bytes of a character are is not said everywhere."""
    code, text = value[:8], value[8:]
    if code == b"UNICODE\0":
        little = text[1::2].count(0) > text[::2].count(0)
        return text.decode("utf-16-le" if little else "utf-16-be").strip("\0\ufeff")
    return _decoded(text if code in (b"ASCII\0\0\0", bytes(8)) else value).strip("\0")


# --------------------------------------------------------------------------------------------- programs


def _parameters(text: str) -> _Found | None:
    """Read what AUTOMATIC1111, Forge and many others write, or Fooocus's JSON."""
    if text.startswith('{"'):
        found = _json(text)
        return _Found(_text(found["prompt"]), _text(found.get("negative_prompt"))) if "prompt" in found else None
    settings = re.search(r"^(?:(?:Steps|Seed): \d|Sampler: \w).*", text, re.MULTILINE)
    prompt, *negative = re.split("^Negative prompt:", text[: settings and settings.start()], maxsplit=1, flags=re.M)
    hashes = re.search(r'TI hashes: "([^"]*)"', settings[0]) if settings else None
    names = [part.partition(":")[0].strip() for part in hashes[1].split(",")] if hashes else []
    embeddings = rf"(?<!\w)(?:{'|'.join(map(re.escape, filter(None, names)))})(?!\w)"
    return _Found(prompt, negative[0] if negative else None, embeddings if any(names) else "")


def _comfyui(text: str) -> _Found | None:
    found = prompts_of(_json(text))
    if len(texts := list(dict.fromkeys(positive for positive, _ in found))) > 1:
        raise ValueError(f"the samplers have several different prompts: {', '.join(map('{!r:.80}'.format, texts[:3]))}")
    return _Found(*found[0]) if found else None


def _invokeai(text: str) -> _Found:
    found = _json(text)
    return _Found(_text(found.get("positive_prompt")), _text(found.get("negative_prompt")), _INVOKEAI)


def _early_invokeai(text: str) -> _Found:
    """Read a prompt of before version 3, with negative ones in square brackets."""
    prompts = text.split('"')[1] if text.startswith('"') else _json(text)["image"]["prompt"]
    joined = prompts if isinstance(prompts, str) else ", ".join(_text(each["prompt"]) for each in prompts)
    negative = r"\[([^\[\]]*)\]"
    return _Found(re.sub(negative, "", joined), ", ".join(re.findall(negative, joined)), _INVOKEAI)


def _novelai(texts: Mapping[str, str]) -> _Found:
    comment = _json(texts.get("Comment", "{}"))
    characters = comment.get("v4_prompt", {}).get("caption", {}).get("char_captions", ())
    parts = [comment.get("prompt", texts.get("Description")), *(each["char_caption"] for each in characters)]
    return _Found(", ".join(filter(None, map(_text, parts))), _text(comment.get("uc")), _NOVELAI)


def _json(text: str) -> Any:
    """Parse JSON; refuse texts that would take much more memory than they have characters."""
    if sum(map(text.count, ",[{")) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES:,} values")
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error


def _text(value: Any) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"expected a text, got {type(value).__name__}")
    return value or ""


# --------------------------------------------------------------------------------------------- sidecars


def _sidecar(file: Path) -> _Found | None:
    """Read NAME.txt, NAME.caption and metadata.jsonl, which must agree; AUTOMATIC1111 writes settings in texts too."""
    found: list[_Found | None] = []
    for text in map(file.with_suffix, (".txt", ".caption")):
        if text.is_file() and text != file:
            try:
                found.append(_parameters(read_regular(text, most=MAX_TEXT).decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                raise ValueError(f"{text.name} is not UTF-8 text; save it in UTF-8") from error
    index = file.with_name("metadata.jsonl")
    if index.is_file():
        state = index.stat()
        found += map(_Found, _listed(index, state.st_mtime_ns, state.st_size).get(file.name, ()))
    known = {each.raw.strip(): each for each in found if each is not None and each.raw.strip()}
    if len(known) > 1:
        raise ValueError(f"several different prompts beside it: {', '.join(map('{!r:.80}'.format, list(known)[:3]))}")
    return next(iter(known.values()), None)


@lru_cache(maxsize=2)
def _listed(index: Path, changed: int, size: int) -> dict[str, list[str]]:
    """Prompts by file name of an imagefolder's metadata.jsonl as it is now."""
    found: dict[str, list[str]] = {}
    with index.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_TEXT + 1), b""), start=1):
            try:
                if len(line) > MAX_TEXT:
                    raise ValueError(_TOO_LONG)
                row = _json(line.decode("utf-8-sig")) if line.strip() else {}
                column = next((name for group in PROMPTS for name in group if row.get(name)), None)
                if column is not None and "file_name" in row:
                    found.setdefault(str(Path(row["file_name"])), []).append(_text(row[column]))
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{index.name}, line {number}: {error}") from error
    return found

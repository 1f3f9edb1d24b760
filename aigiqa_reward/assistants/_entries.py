"""How an answer looks in a file of the cache, and how a file that is not a whole answer is told.

Every entry carries its own key and the hash of its value: a file cut short, altered, or written by someone else under
this name is refused instead of believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from aigiqa_reward.reading import parse_json

Content: TypeAlias = Tensor | str
"""What an assistant is asked about: one image (3, H, W), or one text."""

Value = TypeVar("Value")


class DamagedEntry(ValueError):
    """A file that is not the whole entry its name promises; the message says in what."""


@dataclass(frozen=True, kw_only=True)
class Form(Generic[Value]):
    """One kind of answer as bytes.

    Attributes:
        suffix: of the file's name, with its dot.
        pack: (key, value) to the bytes of a file.
        unpack: (key, bytes) to the value; raises DamagedEntry.
    """

    suffix: str
    pack: Callable[[str, Value], bytes]
    unpack: Callable[[str, bytes], Value]


def key_of(identity: str, content: Content) -> str:
    """The hexadecimal SHA-256 of who is asked (identity) and what about.

    An image counts with its shape and its values as float32, a text with its UTF-8 bytes.
    """
    if isinstance(content, str):
        about: dict[str, Any] = {"content": "text"}
        data: Any = content.encode("utf-8", "surrogatepass")
    else:
        about = {"content": "image", "shape": list(content.shape), "dtype": "float32"}
        data = content.detach().to("cpu", torch.float32).contiguous().numpy().data
    head = json.dumps({"identity": identity, **about}, sort_keys=True)
    digest = hashlib.sha256(head.encode("utf-8") + b"\0")
    digest.update(data)
    return digest.hexdigest()


def _hash_of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _hash_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _pack_tensor(key: str, value: Tensor) -> bytes:
    tensor = value.detach().cpu().contiguous()
    return save({"value": tensor}, metadata={"key": key, "sha256": _hash_of_tensor(tensor)})


def _unpack_tensor(key: str, data: bytes) -> Tensor:
    try:
        tensors = load(data)
    except (SafetensorError, RuntimeError, KeyError) as error:  # sizes that overflow, types that torch does not have
        raise DamagedEntry(f"not a whole safetensors file ({error})") from error
    length = int.from_bytes(data[:8], "little")  # of the JSON header, which `load` found valid
    told = parse_json(data[8 : 8 + length]).get("__metadata__") or {}
    if tensors.keys() != {"value"}:
        raise DamagedEntry(f"expected one tensor 'value', got {sorted(tensors)}")
    _compare(told, key, _hash_of_tensor(tensors["value"]))
    return tensors["value"]


def _pack_text(key: str, value: str) -> bytes:
    entry = {"key": key, "sha256": _hash_of_text(value), "value": value}
    return json.dumps(entry, indent=1).encode("utf-8")


def _unpack_text(key: str, data: bytes) -> str:
    try:
        entry = parse_json(data)
    except ValueError as error:  # also for bytes that are not UTF-8
        raise DamagedEntry(f"not whole JSON ({error})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise DamagedEntry("expected a JSON object with a text 'value'")
    _compare(entry, key, _hash_of_text(entry["value"]))
    return entry["value"]


def _compare(told: dict[str, Any], key: str, sha256: str) -> None:
    if told.get("key") != key:
        raise DamagedEntry("it carries another entry's key")
    if told.get("sha256") != sha256:
        raise DamagedEntry("its value was altered")


TENSOR: Form[Tensor] = Form(suffix=".safetensors", pack=_pack_tensor, unpack=_unpack_tensor)
"""A tensor of any shape and dtype."""

TEXT: Form[str] = Form(suffix=".json", pack=_pack_text, unpack=_unpack_text)
"""A text."""

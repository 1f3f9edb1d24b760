"""Which run a folder belongs to: the settings that decide its result as JSON, compared by name before it is resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aigiqa_reward.utils.io import parse_json, read_json, write_atomically

if TYPE_CHECKING:
    from torch import Tensor, nn

# What decides a module's output besides its tensors: shares of a reward's total, scales of an IP-Adapter and of FreeU.
_FACTORS = ("quality_weight", "correspondence_weight", "weights", "combine", "scale", "s1", "s2", "b1", "b2")


def without_nan(value: Any) -> Any:
    """Return a JSON value with None in place of NaN and infinite numbers, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return standard JSON: None in place of NaN and infinite numbers."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file atomically, with None in place of NaN and infinite numbers."""
    write_atomically(path, to_json(value, indent=2).encode() + b"\n")


def read_jsonl(data: bytes) -> list[Any]:
    """Return the values of JSON lines; a last line that was cut off by an interruption is left out."""
    *whole, last = data.split(b"\n")
    values = [parse_json(line) for line in whole if line.strip()]
    with contextlib.suppress(ValueError):
        values.append(parse_json(last))
    return values


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON value; other objects count as their text."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:16]


def identity(value: Any) -> Any:
    """Return what identifies a value, as JSON: texts and numbers, the content of arrays and images, else the type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): identity(item) for name, item in value.items()}
    form = [str(getattr(value, "dtype", ""))]  # in another the same bytes are other values
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    if hasattr(value, "getpalette"):
        form += [value.mode, str(value.getpalette())]
    if form[0] == "object":  # the bytes of such an array are addresses
        return identity(value.tolist())
    if hasattr(value, "tobytes"):
        size = getattr(value, "shape", None) or value.size
        content = hashlib.sha256(repr(form).encode() + value.tobytes())
        return f"{type(value).__name__} {size} {content.hexdigest()[:16]}"
    return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__name__)}"


def pipeline_identity(pipe: Any) -> dict[str, Any]:
    """Return what identifies a pipeline: its class, options and dtype, and the content of each component by name.

    Equal weights are equal wherever they were loaded from, whether or not they are compiled or offloaded.
    """
    options, dtype = dict(getattr(pipe, "config", None) or {}), getattr(pipe, "dtype", None)
    own = {name: value for name, value in options.items() if name[:1] != "_" and not isinstance(value, list | tuple)}
    parts: Mapping[str, Any] = getattr(pipe, "components", None) or {}
    return {
        "pipeline": f"{type(pipe).__name__} {digest(identity(own))}",
        "dtype": None if dtype is None else str(dtype),
        **{name: None if part is None else _component_identity(part) for name, part in parts.items()},
    }


def _component_identity(part: Any) -> str:
    """Return a component's class, and digests of its weights and of its settings, as far as it has them."""
    settings: Any = getattr(part, "config", None)
    if hasattr(part, "get_vocab"):  # a tokenizer
        settings = [part.get_vocab(), part.model_max_length]
    elif isinstance(settings, Mapping):  # of diffusers; that of transformers says how a model was loaded
        settings = identity({name: value for name, value in settings.items() if name[:1] != "_"})
    else:
        settings = None
    weights = weights_digest(part) if hasattr(part, "state_dict") else ""
    return " ".join(filter(None, [type(getattr(part, "_orig_mod", part)).__name__, weights, digest(settings)]))


def reward_identity(reward: Any) -> str:
    """Return a reward's name and, for a module, a digest of its weights and of the shares of its total."""
    name = getattr(reward, "name", None) or getattr(reward, "__qualname__", type(reward).__name__)
    return f"{name} {weights_digest(reward)}" if hasattr(reward, "state_dict") else str(name)


def weights_digest(module: nn.Module) -> str:
    """Return a digest of the shapes and sums of bits of a module's tensors, and of their factors; equal on all devices.

    Of adapters only those count that change the output: active, with a scale above 0 and without a matrix of zeros.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile
    kinds = {kind for part in module.modules() for kind in getattr(part, "adapter_layer_names", ())}
    weights, adapters = {}, defaultdict(dict)
    for name, tensor in _tensors(module):
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part in kinds), None)
        if place is None:
            weights[".".join(part for part in parts if part not in ("base_layer", "_orig_mod"))] = _bits(tensor)
        else:
            adapters[".".join(parts[:place]), parts[place + 1]][parts[place]] = tensor
    applied = []
    for (path, name), tensors in adapters.items():
        layer: Any = module.get_submodule(path)
        off = layer.disable_adapters or layer.merged or name not in layer.active_adapters
        scale = 0 if off else getattr(layer, "scaling", {}).get(name, 1)
        if scale and all(bool(tensor.any()) for tensor in tensors.values() if tensor.ndim > 1):
            applied.append([path, scale, {kind: _bits(tensor) for kind, tensor in tensors.items()}])
    factors = [[identity(getattr(part, name, None)) for name in _FACTORS] for part in module.modules()]
    return digest([weights, [factor for factor in factors if any(factor)], applied])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's tensors by name, also those that sequential offload keeps elsewhere."""
    for name, tensor in module.state_dict().items():
        if getattr(tensor, "is_meta", False):
            path, _, own = name.rpartition(".")
            kept = getattr(getattr(module.get_submodule(path), "_hf_hook", None), "weights_map", None)
            tensor = tensor if kept is None else kept[own]
        if hasattr(tensor, "full_tensor"):  # sharded over processes, all of which come here
            tensor = tensor.full_tensor()
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's quantized ones
            yield from ((f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
        elif hasattr(tensor, "is_meta"):
            yield name, tensor


def _bits(tensor: Tensor) -> list[Any]:
    """Return a tensor's shape and the sum of its bits in words of 8 bytes; of a tensor without content the shape."""
    import torch

    if tensor.is_meta:
        return [list(tensor.shape)]
    with torch._C.DisableTorchFunctionSubclass():  # parameters of GGUF files
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = data[: len(data) // 8 * 8]
    whole = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64)
    return [list(tensor.shape), int(whole.sum()) + int(data[len(words) :].sum())]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, ignore: Collection[str] = ()) -> list[str]:
    """Return one phrase for each setting that differs between an earlier run and this one."""
    now = json.loads(to_json(now))
    differing = [n for n in sorted({*before, *now} - set(ignore)) if before.get(n) != now.get(n)]
    return [f"{name}: {before.get(name)!r:.80} there, {now.get(name)!r:.80} now" for name in differing]


class RunFolder:
    """A folder that belongs to one run, with that run's settings in a JSON file.

    Args:
        path: folder; it need not exist.
        argument: name of the argument that gave the folder, for errors.
        file: name of the settings file.
        contents: glob patterns of what a run writes: refused without settings, removed with `overwrite`.
        started: glob pattern of what exists once there is something to resume; by default the settings file.

    Example:
        >>> from aigiqa_reward.utils.run_folder import RunFolder
        >>> folder = RunFolder("my-run", contents=["*.png"])
        >>> folder.begin({"seed": 1})
        >>> try:
        ...     folder.begin({"seed": 2})
        ... except ValueError as error:
        ...     print(str(error).split(";")[0])
        output_dir: my-run holds a run with other settings (seed: 1 there, 2 now)
        >>> folder.begin({"seed": 2}, overwrite=True)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        argument: str = "output_dir",
        file: str = "run.json",
        contents: Sequence[str] = (),
        started: str | None = None,
    ) -> None:
        self.path, self.argument = Path(path), argument
        self.file = self.path / file
        self.contents, self.started = contents, started or file

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the earlier run; None without one. Refuse a folder with contents but no settings."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise ValueError(f"{self.argument}: expected a folder, got the file {self.path}")
        try:
            found = read_json(self.file) if self.file.exists() else None
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.argument}: cannot read {self.file} ({error}); choose another folder") from error
        if found is None:
            others = (file for pattern in self.contents for file in self.path.glob(pattern))
            if (other := next(others, None)) is not None:
                raise ValueError(f"{self.argument}: {other} was not written by such a run; choose another folder")
            return None
        if not isinstance(found, dict):
            raise ValueError(f"{self.argument}: {self.file} holds no settings; choose another folder")
        return found

    def check(self, settings: Mapping[str, Any], *, ignore: Collection[str] = ()) -> None:
        """Refuse a folder of a run with other settings, but for those to `ignore`; write nothing."""
        before = self.settings()
        if before is not None and any(self.path.glob(self.started)):
            self.refuse(differences(before, settings, ignore=ignore))

    def refuse(self, differing: Sequence[str]) -> None:
        """Raise a ValueError if there are differences from the earlier run."""
        if differing:
            raise ValueError(
                f"{self.argument}: {self.path} holds a run with other settings ({'; '.join(differing)}); use the same "
                "settings to resume it, choose another folder, or clear this one"
            )

    def begin(self, settings: Mapping[str, Any], *, overwrite: bool = False, ignore: Collection[str] = ()) -> None:
        """Write the settings, after `check` or, with `overwrite`, after removing what the earlier run wrote."""
        if not overwrite:
            self.check(settings, ignore=ignore)
        elif self.settings() is not None:
            for file in [file for pattern in self.contents for file in self.path.glob(pattern) if file.is_file()]:
                file.unlink()
        write_json(self.file, settings)

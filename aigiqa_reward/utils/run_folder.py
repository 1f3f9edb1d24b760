"""Which run a folder belongs to: settings as JSON, compared by name before anything in the folder is continued.

Every command and training that can be resumed writes the settings that decide its result into its folder. A later run
in the same folder continues if its settings are equal, else it is refused with the names of those that differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aigiqa_reward.utils.io import parse_json, read_json, write_atomically

if TYPE_CHECKING:
    from torch import nn

_SHARES = ("quality_weight", "correspondence_weight", "weights", "combine")
"""Attributes that decide the total of a Reward or a CompositeReward besides its tensors."""


# --------------------------------------------------------------------------------------------- JSON


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
    values = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines):
        if line.strip():
            try:
                values.append(parse_json(line))
            except ValueError:
                if number < len(lines) - 1:
                    raise
    return values


# --------------------------------------------------------------------------------------------- identity


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON value; other objects count as their text."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:16]


def identity(value: Any) -> Any:
    """Return what identifies a value, as JSON.

    Numbers and texts are kept, arrays, tensors and PIL images are identified by their content, other objects by their
    type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): identity(item) for name, item in value.items()}
    kind, _, module = type(value).__name__, *type(value).__module__.partition(".")[1::-1]
    if module == "torch" and hasattr(value, "detach"):
        data = value.detach().cpu().double().numpy().tobytes()
        return f"tensor {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
    if module == "PIL":
        return f"image {value.size} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if module == "numpy":
        return f"array {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    return f"{type(value).__module__}.{getattr(value, '__qualname__', kind)}"


def pipeline_identity(pipe: Any) -> dict[str, Any]:
    """Return what identifies a pipeline: its class and origin, its scheduler's configuration and its dtype."""
    origin = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    dtype, scheduler = getattr(pipe, "dtype", None), getattr(pipe, "scheduler", None)
    settings = {k: v for k, v in dict(getattr(scheduler, "config", None) or {}).items() if not k.startswith("_")}
    return {
        "pipeline": f"{type(pipe).__name__} {origin or ''}".strip(),
        "scheduler": None if scheduler is None else f"{type(scheduler).__name__} {digest(settings)}",
        "dtype": None if dtype is None else str(dtype),
    }


def reward_identity(reward: Any) -> str:
    """Return a reward's name and, for a module, a digest of its weights and of the shares of its total."""
    name = getattr(reward, "name", None) or getattr(reward, "__qualname__", type(reward).__name__)
    return f"{name} {weights_digest(reward)}" if hasattr(reward, "state_dict") else str(name)


def weights_digest(module: nn.Module) -> str:
    """Return a digest of a module's tensors, equal on every device and for any number of threads.

    A tensor counts by its shape and the sum of its bits as integers.
    """
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def sum_of_bits(tensor: torch.Tensor) -> int:
        plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return int(plain.detach().view(bits[plain.element_size()]).sum(dtype=torch.int64))

    state = module.state_dict()
    tensors = {k: (list(t.shape), sum_of_bits(t)) for k, t in state.items() if isinstance(t, torch.Tensor)}
    return digest([tensors, [[identity(getattr(m, name, None)) for name in _SHARES] for m in module.modules()]])


# --------------------------------------------------------------------------------------------- the folder


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, ignore: Collection[str] = ()) -> list[str]:
    """Return one phrase for each setting that differs between an earlier run and this one."""
    now = json.loads(to_json(now))
    names = [name for name in sorted(before.keys() | now.keys()) if name not in ignore]
    return [
        f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} now"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


class RunFolder:
    """A folder that belongs to one run, with that run's settings in a JSON file.

    Args:
        path: folder; it need not exist.
        argument: name of the argument or option that gave the folder, for errors.
        file: name of the settings file.
        contents: names or glob patterns of the files that a run writes: without settings beside them they are refused,
            with `overwrite` they are removed.
        started: glob pattern of the files that exist as soon as there is something to resume; by default that is the
            settings file.

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
        self.path = Path(path)
        self.argument = argument
        self.file = self.path / file
        self.contents = tuple(contents)
        self._started = started

    @property
    def started(self) -> bool:
        """Whether there is something to resume."""
        return self.file.exists() if self._started is None else any(self.path.glob(self._started))

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
        """Refuse a folder of a run with other settings; write nothing.

        Args:
            settings: settings that decide the result of this run, by name, as JSON.
            ignore: settings that may differ.
        """
        before = self.settings()
        if before is not None and self.started:
            self.refuse(differences(before, settings, ignore=ignore))

    def refuse(self, differing: Sequence[str]) -> None:
        """Raise a ValueError if there are differences from the earlier run."""
        if differing:
            raise ValueError(
                f"{self.argument}: {self.path} holds a run with other settings ({'; '.join(differing)}); use the same "
                "settings to resume it, choose another folder, or start again with overwrite"
            )

    def begin(self, settings: Mapping[str, Any], *, overwrite: bool = False, ignore: Collection[str] = ()) -> None:
        """Write the settings, after `check` or, with `overwrite`, after removing what the earlier run wrote.

        A folder that no run wrote is refused with `overwrite` as well.
        """
        if overwrite:
            if self.settings() is not None:
                for file in [file for pattern in self.contents for file in self.path.glob(pattern) if file.is_file()]:
                    file.unlink()
        else:
            self.check(settings, ignore=ignore)
        write_json(self.file, settings)

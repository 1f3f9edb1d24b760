"""What a LoRA file may say: its metadata become settings of peft, and its names patterns that peft searches with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (list,),
    "exclude_modules": (list,),
    "init_lora_weights": (bool, str),
    "bias": (str,),
    "peft_type": (str,),
    "task_type": (str,),
    "peft_version": (str,),
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "fan_in_fan_out": (bool,),
    "inference_mode": (bool,),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "lora_bias": (bool,),
    "ensure_weight_tying": (bool,),
}
"""Settings that change how the weights are used, and their kinds; of all others only nothing, or peft's default."""

_INITIAL = (True, False, "gaussian", "orthogonal")
"""Ways to begin that leave the base model as it is; the weights of the file take their place."""

_PATTERN = re.compile(r"[()\[\]{}|+*?]")
"""What makes a name a pattern that may take for ever to search with."""


def check_lora(state: Mapping[str, Any], metadata: Any) -> None:
    """Refuse a LoRA with weights that are no numbers, or with settings that do more than describe them.

    Args:
        state: its tensors by name.
        metadata: its settings by name, with the part of the pipeline before each; None where it has none.

    Raises:
        ValueError: what is wrong.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{name!r} holds {tensor.dtype} numbers, expected floating ones of 16 bits at least")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or infinite values")
        if ".lora" in name and _PATTERN.search(name):
            raise ValueError(f"{name!r} is no name of a layer")
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise ValueError(f"its metadata are no settings by name, but {type(metadata).__name__}")
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    for place, value in metadata.items():
        name = str(place).rpartition(".")[2]
        _check_setting(name, value, usual.get(name))


def _check_setting(name: str, value: Any, usual: Any) -> None:
    if name not in _KINDS:
        if value and value != usual:
            raise ValueError(f"its metadata set {name!r}, which is not read from a file")
        return
    if value is None:
        return
    if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
        raise ValueError(f"its metadata set {name} to {value!r:.80}, expected {_KINDS[name][0].__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"its metadata set {name} to {value}")
    if name == "init_lora_weights" and value not in _INITIAL:
        raise ValueError(f"its metadata begin by {value!r}, which changes the base model")
    names = list(value) if isinstance(value, list | dict) else []
    if wrong := [each for each in names if not isinstance(each, str) or _PATTERN.search(each)]:
        raise ValueError(f"its metadata hold {wrong[0]!r:.80} in {name}, which is no name of a layer")

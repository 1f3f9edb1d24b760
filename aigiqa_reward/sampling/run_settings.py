"""What decides the outcome of a run over many prompts, as JSON, and where two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from aigiqa_reward.sampling.best_of_n import BestOfN
from aigiqa_reward.selection import integer

_LISTED = 5  # prompts that differ

_NOTED_LATER = ("scheduler", "dtype", "reward_weights", "lora_weights")
"""Not in the folders of earlier versions, which are taken to have been made with what is used now."""

_SHARES = ("quality_weight", "correspondence_weight", "weights", "combine")
"""What a Reward and a CompositeReward make their totals by, beside their tensors."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def describe(search: BestOfN, seed: Any, settings: Mapping[str, Any], pipe_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the outcome of a run, as JSON.

    Not seen are the code of a reward that is a function, what a reward asks beside its weights (assistants, a service),
    and weights of the pipeline that were changed in place or below the same path.
    """
    dtype = getattr(search.pipe, "dtype", None)
    return {
        **{name: described(value) for name, value in settings.items()},  # first: none of them hides what is seen here
        "pipeline": pipeline_name(search.pipe),
        "scheduler": scheduler_name(search.pipe),
        "dtype": None if dtype is None else str(dtype),
        "reward": reward_name(search.reward),
        "reward_weights": weights_digest(search.reward),
        "n": search.n,
        "top_k": search.top_k,
        "pruning": None if search.pruning is None else repr(search.pruning),
        "search": "random" if search.search is None else repr(search.search),
        "diverse": search.diverse,
        "reward_prompt": search.reward_prompt,
        "seed": integer("seed", seed),
        "pipe_kwargs": {name: described(value) for name, value in pipe_kwargs.items()},
    }


def pipeline_name(pipe: Any) -> str:
    """A pipeline's class, and where it was loaded from."""
    name_or_path = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    return f"{type(pipe).__name__} {name_or_path or ''}".strip()


def reward_name(reward: Any) -> str:
    """A reward's name, or the function's or class's."""
    return str(getattr(reward, "name", None) or getattr(reward, "__qualname__", type(reward).__name__))


def scheduler_name(pipe: Any) -> str | None:
    """The class of a pipeline's scheduler, and a digest of its configuration; None without a scheduler."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return None
    config = dict(getattr(scheduler, "config", {}))
    public = {name: value for name, value in config.items() if not name.startswith("_")}  # not diffusers' version
    return f"{type(scheduler).__name__} {digest(public)}"


def weights_digest(reward: Any) -> str | None:
    """Tells a module's weights, and the shares that its total is made of, from others'; None of a function.

    Tensors count by shape and by the sum of their bits as integers, which is the same in any order: on any device and
    with any number of threads.
    """
    if not isinstance(reward, nn.Module):
        return None
    tensors = {name: t for name, t in reward.state_dict().items() if isinstance(t, Tensor)}
    shares = [[described(getattr(module, name, None)) for name in _SHARES] for module in reward.modules()]
    return digest([{name: (list(t.shape), _sum_of_bits(t)) for name, t in tensors.items()}, shares])


def digest(value: Any) -> str:
    """Tells what can be written as JSON from others."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _sum_of_bits(tensor: Tensor) -> int:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return int(plain.detach().view(_BITS[plain.element_size()]).sum(dtype=torch.int64))


def described(value: Any) -> Any:
    """A value as JSON: numbers and texts as they are, pixels and tensors by what is in them, others by their type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): described(item) for name, item in value.items()}
    if isinstance(value, Tensor):
        data = value.detach().cpu().double().numpy().tobytes()
        return f"tensor {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, Image.Image):
        return f"image {value.size} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def differences(
    before: Mapping[str, Any], settings: Mapping[str, Any], earlier: Sequence[str], prompts: Sequence[str]
) -> Iterator[str]:
    """Where another run differs, one phrase each; more prompts at the end are no difference."""
    now = json.loads(json.dumps(settings))
    for name in sorted(before.keys() | now.keys()):
        if name in _NOTED_LATER and name not in before:
            continue
        if before.get(name) != now.get(name):
            yield f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
    if len(prompts) < len(earlier):
        yield f"prompts: {len(earlier)} there, {len(prompts)} now; more may be added at the end, none left out"
    changed = [place for place, (a, b) in enumerate(zip(earlier, prompts, strict=False)) if a != b]
    for place in changed[:_LISTED]:
        yield f"prompt {place}: {_short(earlier[place])} there, {_short(prompts[place])} now"
    if len(changed) > _LISTED:
        yield f"{len(changed) - _LISTED} more prompts"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")

"""Checks of arguments; each returns the value that it accepts."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra of this package, which is not on PyPI."""
    return f'pip install ".[{extra}]" (in a checkout of aigiqa-reward)'


def integer(argument: str, value: Any, *, least: int | None = None) -> int:
    """Return an integer of Python or numpy, at least `least`; `argument` is its name in errors."""
    expected = "an integer" if least is None else f"an integer of at least {least}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{argument}: expected {expected}, got {value!r} ({type(value).__name__}); pass a whole number")
    number = operator.index(value)
    if least is not None and number < least:
        raise ValueError(f"{argument}: expected {expected}, got {number}; pass {argument}={least} or more")
    return number


def number(argument: str, value: Any, expected: str, accepts: Callable[[float], bool]) -> float:
    """Return a real number that `accepts` accepts as a float; errors say which are `expected`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: expected a number {expected}, got {value!r} ({type(value).__name__})")
    if not accepts(float(value)):
        raise ValueError(f"{argument}: expected a number {expected}, got {value!r}")
    return float(value)


def first_seed(seed: Any, count: int, of: str) -> int:
    """Return the first of `count` consecutive seeds that torch.Generator accepts; errors name what they are `of`."""
    first = integer("seed", seed)
    lowest, highest = -(2**63), 2**64 - count  # torch.Generator.manual_seed takes [-2**63, 2**64)
    if not lowest <= first <= highest:
        span = f"[-2**63, 2**64 - {count}]"
        raise ValueError(f"seed: expected an integer in {span}, so that {of} have one for torch.Generator, got {first}")
    return first


def is_pipeline(value: object) -> bool:
    """Return whether this is a diffusers pipeline, without importing diffusers."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(value).__mro__)


def check_reward(reward: Any, pipe: object = None, *, argument: str = "reward") -> Any:
    """Return a reward that can be called and is no pipeline; `pipe` is the argument before it, which may be swapped."""
    if callable(reward) and not is_pipeline(reward):
        return reward
    swapped = is_pipeline(reward) and pipe is not None and not is_pipeline(pipe)
    remedy = "swap the two: the pipeline comes first" if swapped else "use create_reward, or a name of list_rewards()"
    kind = f"{'the pipeline ' * is_pipeline(reward)}{type(reward).__name__}"
    raise TypeError(f"{argument}: expected a Reward, its name or a function f(images, prompts), got {kind}; {remedy}")


def lone_surrogate(text: str) -> str | None:
    """Return that a text has half of a character or an undecoded byte, which no tokenizer reads; None if not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"half of a character or an undecoded byte at position {error.start}"
        return f"has {place}; cut and decode texts by whole characters"
    return None


def check_prompt(prompt: object, argument: str = "prompt", *, several: str = "loop over them") -> str | None:
    """Return one prompt, or None; texts that no tokenizer reads are refused, and lists, with a remedy for `several`."""
    if isinstance(prompt, list | tuple):
        raise TypeError(f"{argument}: expected one prompt per call, got {len(prompt)}; {several}")
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"{argument}: expected a text, got {type(prompt).__name__}; pass a str")
    if prompt is not None and (fault := lone_surrogate(prompt)):
        raise ValueError(f"{argument}: {prompt!r} {fault}")
    return prompt


def check_text(text: object, argument: str, remedy: str) -> str:
    """Return a text that is not blank; errors end with the remedy."""
    if text is None or (isinstance(text, str) and not text.strip()):
        raise ValueError(f"{argument}: expected a text for the reward to see, got {text!r}; {remedy}")
    if not isinstance(text, str):
        raise TypeError(f"{argument}: expected a text, got {type(text).__name__}; pass a str")
    return text

"""What `finetune` and `pairs` share: arguments of the pipeline, a reward, the library's errors in words of options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.options import DType
from aigiqa_reward.cli.pipelines import EMBEDDED
from aigiqa_reward.cli.plans import file_errors, parse_settings
from aigiqa_reward.cli.runs import load_reward, usage_errors
from aigiqa_reward.cli.sampling_options import EMBEDDED_SAMPLING

if TYPE_CHECKING:
    from aigiqa_reward.rewards.reward import Reward

_SAMPLING = ("num_inference_steps", "guidance_scale", "height", "width")
_OTHER_NAMES = {
    "pipe": "pretrained_model_name_or_path",
    "out": "output_dir",
    "folder": "output_dir",
    "name": "reward",
    "weights": "reward_weights",
    "holdout": "holdout_reward",
}
"""Arguments of the library whose options are called otherwise."""

_ARGUMENT = re.compile(r"^(\w+)(?=: )")
_ASSIGNMENT = re.compile(r"\b(\w+)=('?)([\w./-]*)\2")


def sampling_arguments(given: Mapping[str, Any], taken: Iterable[str] = ()) -> dict[str, Any]:
    """Arguments of the pipeline's call: those with options of their own, and those of --set.

    Args:
        given: the command's options by name.
        taken: names that --set may not have, beside those with options of their own.

    Raises:
        CommandError: one is given twice, or is none of the pipeline's.
    """
    named = {name: given[name] for name in _SAMPLING if given[name] is not None}
    further = parse_settings(given["settings"] or [])
    if twice := sorted(named.keys() & further.keys()):
        raise CommandError(f"--set: {twice[0]} is given by --{twice[0]} already")
    if wrong := sorted(further.keys() & {"prompt", "need", *taken}):
        raise CommandError(f"--set: {wrong[0]} is no further argument of the pipeline; see the options of this command")
    own = EMBEDDED_SAMPLING if given["pretrained_model_name_or_path"] == EMBEDDED else {}
    return {**own, **named, **further}


def reward_of(name: str, weights: str | None, device: str, *, option: str = "reward") -> Reward:
    """The reward that an option names.

    Raises:
        CommandError: there is none.
    """
    with option_errors({"reward", "reward_weights"}, {"name": option}):
        return load_reward(name, None, None, weights, False, None, None, None, None, device, DType.FLOAT32)


@contextmanager
def option_errors(options: Iterable[str], others: Mapping[str, str] | None = None) -> Iterator[None]:
    """Around calls of the library: what it says of its arguments is an error of the options of those names.

    Args:
        options: names of the command's options.
        others: options of arguments that are called otherwise, beside the usual ones.
    """
    names = _OTHER_NAMES | {name: name for name in options} | dict(others or {})
    try:
        with usage_errors("lower --train_batch_size or take --gradient_checkpointing"), file_errors():
            yield
    except ImportError as error:
        raise CommandError(in_options(str(error), names)) from error
    except CommandError as error:
        raise CommandError(in_options(str(error), names), status=error.status) from error


def in_options(text: str, names: Mapping[str, str]) -> str:
    """An error of the library as the command line's: `rank: ...` is `--rank: ...`, and `rank=4` is `--rank 4`."""
    text = _ARGUMENT.sub(lambda found: f"--{names[found[1]]}" if found[1] in names else found[1], text)
    return _ASSIGNMENT.sub(
        lambda found: f"--{names[found[1]]} {found[3]}".strip() if found[1] in names else found[0], text
    )

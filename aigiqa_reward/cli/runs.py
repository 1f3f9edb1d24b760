"""What the commands do with the library: load a reward, score, sample. Imports torch when it is needed.

What the library says of its arguments becomes a CommandError; an interruption keeps what there is by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aigiqa_reward.cli.inputs import CommandError, Source
from aigiqa_reward.cli.options import DType
from aigiqa_reward.cli.output import Row, progress, say, scored

if TYPE_CHECKING:
    from aigiqa_reward.rewards.reward import Reward
    from aigiqa_reward.rewards.scorer import ScoredImage
    from aigiqa_reward.sampling import BestOfN, BestOfNOutput


@contextmanager
def usage_errors(out_of_memory: str = "lower --batch-size") -> Iterator[None]:
    """Around calls of the library: what it says of its arguments is an error of the command.

    Args:
        out_of_memory: what to do about it, where the library does not say.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = " ".join(getattr(error, "__notes__", [])) or out_of_memory
        raise CommandError(f"out of memory ({str(error).splitlines()[0]}); {advice}", status=1) from error
    except (ValueError, TypeError) as error:
        raise CommandError("; ".join([str(error), *getattr(error, "__notes__", [])])) from error


def load_reward(
    name: str,
    encoder: str | None,
    encoder_weights: str | None,
    weights: str | None,
    zero_shot: bool,
    scenario: str | None,
    preferences: Path | None,
    quality_weight: float | None,
    correspondence_weight: float | None,
    device: str | None,
    dtype: DType,
) -> Reward:
    """Build the reward that the options describe.

    Raises:
        CommandError: they do not go together, or what they name does not exist.
    """
    if encoder_weights is not None and encoder is None:
        raise CommandError("--encoder-weights: names the weights of --encoder, which is missing")
    import torch

    from aigiqa_reward import create_reward
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

    with usage_errors():
        return create_reward(
            name,
            encoder=None if encoder is None else OpenCLIPConfig(architecture=encoder, pretrained=encoder_weights),
            weights=weights,
            zero_shot=zero_shot,
            scenario=scenario,
            preferences=preferences,
            quality_weight=quality_weight,
            correspondence_weight=correspondence_weight,
            device=usable_device(device),
            dtype=getattr(torch, dtype.value),
        )


def usable_device(name: str | None) -> str:
    """The device of that name; None is cuda if there is one, else the CPU.

    Raises:
        CommandError: nothing can be computed there.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device: cannot compute on {name!r} here ({reason}); try --device cpu") from error
    return name


def first_process() -> bool:
    """Whether this is the process that speaks for all (torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def process_device(name: str | None) -> str:
    """The device of that name; of several processes (torchrun) each has one of its own.

    Raises:
        CommandError: nothing can be computed there, or several processes are given one device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return usable_device(name)
    if name not in (None, "cpu"):
        raise CommandError(f"--device: each of several processes takes a device of its own; leave out {name!r}")
    from accelerate import PartialState

    return str(PartialState(cpu=name == "cpu").device)


@dataclass(kw_only=True)
class ScoringRun:
    """Rows of the images that were reached, in their order, and what ended the scoring early, if anything did."""

    rows: list[Row] = field(default_factory=list)
    failure: CommandError | KeyboardInterrupt | None = None

    def conclude(self, images: int) -> None:
        """End the command with the status that fits."""
        if isinstance(self.failure, KeyboardInterrupt):
            say("error", f"interrupted: the result holds {len(self.rows)} of {images} images")
            raise typer.Exit(130) from self.failure
        if self.failure is not None:
            raise self.failure
        if any(row.error is not None for row in self.rows):
            raise typer.Exit(1)


def score_sources(reward: Reward, sources: Sequence[Source], batch_size: int) -> ScoringRun:
    """Score all sources that can be scored; when interrupted, give what is there by then."""
    from aigiqa_reward import Scorer

    rows = {i: Row(key=s.path, prompt=None, error=s.error) for i, s in enumerate(sources) if s.error is not None}
    places = [i for i in range(len(sources)) if i not in rows]
    prompts = [text for i in places if (text := sources[i].prompt) is not None] or None
    if prompts is None and reward.needs_prompts and places:
        raise CommandError(f"{reward.name} needs prompts here: pass --prompt or --prompts-file")
    for row in rows.values():
        _report(row)
    result = ScoringRun()
    try:
        with progress("scoring", len(places)) as show, usage_errors():
            scorer = Scorer(reward, batch_size)
            for scored_image in scorer.stream([sources[i].path for i in places], prompts) if places else ():
                place = places[scored_image.index]
                rows[place] = _row(sources[place], scored_image)
                _report(rows[place])
                show(scored_image.index + 1)
    except (CommandError, KeyboardInterrupt) as error:
        result.failure = error
    result.rows = [rows[place] for place in sorted(rows)]
    return result


def _row(source: Source, result: ScoredImage) -> Row:
    if result.output is None:
        return Row(key=source.path, prompt=source.prompt, error=result.error)
    output = result.output
    correspondence = None if output.correspondence is None else output.correspondence.item()
    return scored(source.path, source.prompt, output.total.item(), output.quality.item(), correspondence)


def _report(row: Row) -> None:
    if row.error is not None:
        known = row.error.startswith(f"{row.key}: ")
        say("error", row.error if known else f"{row.key}: {row.error}")


def sample(
    search: BestOfN, prompt: str, seed: int, settings: dict[str, Any]
) -> tuple[BestOfNOutput | None, CommandError | KeyboardInterrupt | None]:
    """The last output that was reached, and what ended the sampling early, if anything did."""
    from aigiqa_reward.sampling import NothingRankedError

    output = None
    try:
        with progress("best of n", search.n) as show, usage_errors():
            for output in search.stream(prompt, seed, **settings):
                show(len(output.all_seeds))
    except (CommandError, KeyboardInterrupt) as error:
        return output, error
    except NothingRankedError as error:
        return error.output, CommandError(str(error), status=1)
    return output, None

"""What our loop has to know of diffusers' schedulers: clean predictions, and histories that follow the candidates."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BY_TIMESTEP = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler")
"""Noise levels by timestep; latents are alpha x0 + sigma eps with alpha^2 + sigma^2 = 1."""

BY_SIGMA = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
"""Noise levels by step, as sigma / alpha; latents as above, or as those of flow matching (`use_flow_sigmas`)."""

EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""Noise levels by step; latents are x0 + sigma eps."""

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Noise levels by step; latents are (1 - sigma) x0 + sigma eps, the model predicts eps - x0."""

_AS_FLOW = "use_flow_sigmas=True, prediction_type='flow_prediction'"

SERVED = (*BY_TIMESTEP, *BY_SIGMA, *EXPLODING, *FLOW)

SEVERAL_CALLS_A_STEP = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
)
"""Of a higher order by further calls of the denoiser, whose points in between are no samples of the process."""


def check_scheduler(scheduler: Any, *, need: str, served: Sequence[str] = SERVED, flow: bool = False) -> None:
    """Refuse a scheduler whose state our loop cannot carry, or that is not for the model.

    Args:
        scheduler: of a pipeline.
        need: what asks, for the error.
        served: names of the classes that it can use.
        flow: whether the model was trained by flow matching, whose output other schedulers misread.

    Raises:
        ValueError: another class, or one that stands for another (subclasses may hold more state).
    """
    name = type(scheduler).__name__
    if name in served and (not flow or is_flow(scheduler)):
        return
    serves, first = ", ".join(served), served[0]
    if flow or name.startswith("FlowMatch") or is_flow(scheduler):
        own, others = ([each for each in served if each in kind] for kind in (FLOW, BY_SIGMA))
        serves, first = f"{', '.join(own)}; and with {_AS_FLOW}: {', '.join(others)}", own[0]
    raise ValueError(
        f"scheduler: {need} cannot serve {name}{' for a model of flow matching' if flow else ''}; it serves {serves}. "
        f"Set pipe.scheduler = {first}.from_config(pipe.scheduler.config)"
    )


def is_flow(scheduler: Any) -> bool:
    """Whether latents are (1 - sigma) x0 + sigma eps."""
    config = getattr(scheduler, "config", {})
    return type(scheduler).__name__ in FLOW or bool(config.get("use_flow_sigmas"))


def noise_level(scheduler: Any, step: int) -> tuple[Tensor, Tensor]:
    """The scalars alpha and sigma in float32, with latents = alpha x0 + sigma eps, before step number `step`."""
    if type(scheduler).__name__ in BY_TIMESTEP:
        time = int(scheduler.timesteps[step])
        kept = scheduler.alphas_cumprod[time].to(torch.float32)
        return kept.sqrt(), (1 - kept).sqrt()
    sigma = _sigma(scheduler, step)
    if is_flow(scheduler):
        return 1 - sigma, sigma
    if type(scheduler).__name__ in EXPLODING:
        return torch.ones_like(sigma), sigma
    alpha = 1 / (sigma**2 + 1).sqrt()
    return alpha, sigma * alpha


def _sigma(scheduler: Any, step: int) -> Tensor:
    between = getattr(scheduler, "sigmas_interpol", None)
    if between is not None and not scheduler.state_in_first_order:
        before = type(scheduler).__name__ == "KDPM2AncestralDiscreteScheduler"  # whose list begins a place earlier
        return between[step - before].to(torch.float32)  # the second call of a DPM-2 step
    return scheduler.sigmas[step].to(torch.float32)


def predict_clean(scheduler: Any, step: int, latents: Tensor, output: Tensor) -> Tensor:
    """The clean latents x0 that a model's output stands for, in at least float32; differentiable in both.

    Args:
        scheduler: with its timesteps set.
        step: number of the step that `output` was predicted for.
        latents: (B, ...) before that step, not scaled for the model.
        output: (B, ...) of the model, after guidance.
    """
    alpha, sigma = (value.to(latents.device) for value in noise_level(scheduler, step))
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    output = output.to(x.dtype)
    kind = _kind(scheduler)
    if kind == "flow_prediction":
        return x - sigma * output
    if kind == "sample":
        return output
    if kind == "epsilon":
        return (x - sigma * output) / alpha
    if kind == "v_prediction":
        norm = (alpha**2 + sigma**2).sqrt()  # 1, but for latents whose variance explodes
        return (alpha / norm) * (x / norm) - (sigma / norm) * output
    raise ValueError(
        f"scheduler: {type(scheduler).__name__} has prediction_type={kind!r}; expected epsilon, sample, v_prediction "
        "or flow_prediction"
    )


def output_for(scheduler: Any, step: int, latents: Tensor, clean: Tensor) -> Tensor:
    """The model output that stands for clean latents x0: the inverse of `predict_clean`."""
    alpha, sigma = (value.to(latents.device) for value in noise_level(scheduler, step))
    x = latents.to(clean.dtype)
    kind = _kind(scheduler)
    if kind == "flow_prediction":
        return (x - clean) / sigma
    if kind == "sample":
        return clean
    if kind == "epsilon":
        return (x - alpha * clean) / sigma
    norm = (alpha**2 + sigma**2).sqrt()
    return ((alpha / norm) * (x / norm) - clean) / (sigma / norm)


def _kind(scheduler: Any) -> str:
    """What the model predicts."""
    kind = "flow_prediction" if type(scheduler).__name__ in FLOW else scheduler.config.prediction_type
    if (kind == "flow_prediction") != is_flow(scheduler):
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} has prediction_type={kind!r} with "
            f"use_flow_sigmas={bool(scheduler.config.get('use_flow_sigmas'))}; flow_prediction and flow sigmas belong "
            "together: set both, or neither"
        )
    return kind


def step_arguments(scheduler: Any, generators: Sequence[torch.Generator], eta: float) -> dict[str, Any]:
    """What a scheduler's `step` takes beside output, time and sample; noise for candidate i comes from generator i."""
    taken = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"generator": list(generators)} if "generator" in taken else {}
    if "eta" in taken:
        arguments["eta"] = eta
    return arguments


# --------------------------------------------------------------------------------------------- histories


def with_history_of(scheduler: Any, rows: Sequence[int], like: Tensor) -> Any:
    """A scheduler at the same step whose history is that of these candidates; the given one is not touched.

    Args:
        scheduler: somewhere in a run.
        rows: places of candidates, which may repeat.
        like: (B, ...) latents of the run; what a scheduler remembers of candidates has their shape.
    """
    index = torch.as_tensor(list(rows), dtype=torch.long, device=like.device)
    return _rebuilt(scheduler, like, lambda values: values[0][index.to(values[0].device)], [scheduler])


def joined_history(schedulers: Sequence[Any], likes: Sequence[Tensor]) -> Any:
    """One scheduler for the candidates of several at the same step, in order."""
    return _rebuilt(schedulers[0], likes[0], torch.cat, schedulers)


def _rebuilt(first: Any, like: Tensor, combine: Callable[[list[Tensor]], Tensor], sources: Sequence[Any]) -> Any:
    def remembered(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == like.ndim and value.shape[1:] == like.shape[1:]

    result = copy.copy(first)
    for name, value in vars(first).items():
        if remembered(value):
            setattr(result, name, combine([getattr(source, name) for source in sources]))
        elif isinstance(value, list):
            columns = zip(*(getattr(source, name) for source in sources), strict=True)
            setattr(result, name, [combine(list(c)) if remembered(c[0]) else c[0] for c in columns])
    return result

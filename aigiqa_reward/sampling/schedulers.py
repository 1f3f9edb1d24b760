"""Diffusers' schedulers as our loop uses them: clean predictions, and histories that follow the candidates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _names(*names: str, kind: str = "") -> tuple[str, ...]:
    return tuple(f"{name}{kind}Scheduler" for name in names)


BY_TIMESTEP = _names("DDIM", "DDPM", "PNDM", "LCM", "TCD")
"""Noise levels by timestep; latents are alpha x0 + sigma eps with alpha^2 + sigma^2 = 1."""

BY_SIGMA = (*_names("DPMSolver", "UniPC", "DEIS", kind="Multistep"), *_names("DPMSolverSinglestep", "SASolver"))
"""Noise levels by step, as sigma / alpha; latents as above, or as those of flow matching (`use_flow_sigmas`)."""

EXPLODING = _names("Euler", "EulerAncestral", "Heun", "LMS", "KDPM2", "KDPM2Ancestral", kind="Discrete")
"""Noise levels by step; latents are x0 + sigma eps."""

FLOW = _names("FlowMatchEuler", "FlowMatchHeun", kind="Discrete")
"""Noise levels by step; latents are (1 - sigma) x0 + sigma eps, the model predicts eps - x0."""

SERVED = (*BY_TIMESTEP, *BY_SIGMA, *EXPLODING, *FLOW)

SEVERAL_CALLS_A_STEP = _names("Heun", "KDPM2", "KDPM2Ancestral", "FlowMatchHeun", kind="Discrete")
SEVERAL_CALLS_A_STEP += _names("DPMSolverSinglestep")
"""Higher-order schedulers that call the denoiser several times per step, between the samples of the process."""


PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""What a model may predict: eps, alpha eps - sigma x0 (Salimans & Ho 2022), x0, or eps - x0."""


def check_scheduler(scheduler: Any, *, need: str, flow: bool, served: Sequence[str] = SERVED) -> None:
    """Refuse a scheduler whose state our loop cannot carry (subclasses may hold more), or that does not fit the model.

    `flow` is whether the model was trained by flow matching; schedulers of one kind misread the output of the other.
    """
    name, fits = type(scheduler).__name__, is_flow(scheduler) == flow
    if name in served and fits:
        return
    own = [each for each in served if (each in FLOW) == flow]
    serves, remedy = ", ".join(own), f"{own[0]}.from_config(pipe.scheduler.config)"
    if flow:
        others = ", ".join(each for each in served if each in BY_SIGMA)
        serves += f"; and with use_flow_sigmas=True, prediction_type='flow_prediction': {others}"
    elif not fits:  # whose configuration lacks the model's noise levels
        remedy = f"{own[0]}.from_pretrained(MODEL, subfolder='scheduler'), by the model's own configuration"
    kind = (
        " for a model of flow matching" if flow else "" if fits else ", of flow matching, for a model of another kind"
    )
    raise ValueError(f"scheduler: {need} cannot serve {name}{kind}; it serves {serves}. Set pipe.scheduler = {remedy}")


def is_flow(scheduler: Any) -> bool:
    """Return whether latents are (1 - sigma) x0 + sigma eps."""
    name = type(scheduler).__name__  # `from_config` leaves the settings of other schedulers in a configuration
    return name.startswith("FlowMatch") or (name in BY_SIGMA and bool(scheduler.config.get("use_flow_sigmas")))


def noise_level(scheduler: Any, step: int) -> tuple[Tensor, Tensor]:
    """Return the scalars alpha and sigma in float32, with latents = alpha x0 + sigma eps, before step number `step`."""
    if type(scheduler).__name__ in BY_TIMESTEP:
        kept = scheduler.alphas_cumprod[int(scheduler.timesteps[step])].to(torch.float32)
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
    """Return the clean latents x0 that follow from a model's output, in at least float32; differentiable in both.

    `latents` (B, ...) are those before the step, not scaled for the model; `output` (B, ...) is after guidance.
    """
    alpha, sigma = (value.to(latents.device) for value in noise_level(scheduler, step))
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    output = output.to(x.dtype)
    name = type(scheduler).__name__
    kind = "flow_prediction" if name in FLOW else scheduler.config.prediction_type
    if (kind == "flow_prediction") != is_flow(scheduler):
        raise ValueError(
            f"scheduler: {name} has prediction_type={kind!r} with use_flow_sigmas="
            f"{bool(scheduler.config.get('use_flow_sigmas'))}; they belong together: set both, or neither"
        )
    if kind not in PREDICTIONS:
        raise ValueError(f"scheduler: {name} has prediction_type={kind!r}; expected {', '.join(PREDICTIONS)}")
    return clean_of(kind, x, output, alpha, sigma)


def clean_of(kind: str, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the x0 that follows from a model output of one of `PREDICTIONS`, for latents x = alpha x0 + sigma eps."""
    if kind == "flow_prediction":
        return x - sigma * output
    if kind == "sample":
        return output
    if kind == "epsilon":
        return (x - sigma * output) / alpha
    norm = (alpha**2 + sigma**2).sqrt()  # 1, but for latents whose variance explodes
    return (alpha / norm) * (x / norm) - (sigma / norm) * output


def with_history_of(scheduler: Any, rows: Sequence[int], like: Tensor) -> Any:
    """Copy a scheduler with the history of the candidates in these rows only, which may repeat.

    History is recognized by the shape of `like`, the latents (B, ...) of the run.
    """
    index = torch.as_tensor(list(rows), dtype=torch.long, device=like.device)
    return _rebuilt([scheduler], like, lambda values: values[0][index.to(values[0].device)])


def joined_history(schedulers: Sequence[Any], like: Tensor) -> Any:
    """Join the histories of several schedulers at the same step, in order."""
    return _rebuilt(schedulers, like, torch.cat)


def _rebuilt(sources: Sequence[Any], like: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Any:
    def remembered(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == like.ndim and value.shape[1:] == like.shape[1:]

    result = copy.copy(sources[0])
    for name, value in vars(sources[0]).items():
        if remembered(value):
            setattr(result, name, combine([getattr(source, name) for source in sources]))
        elif isinstance(value, list):
            columns = zip(*(getattr(source, name) for source in sources), strict=True)
            setattr(result, name, [combine(list(c)) if remembered(c[0]) else c[0] for c in columns])
    return result

"""Flow-GRPO: policy gradient on the steps of a flow model that is sampled by a stochastic differential equation.

Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from aigiqa_reward.finetuning.policy import flow_sde_weights
from aigiqa_reward.finetuning.policy_gradient import PolicyGradient
from aigiqa_reward.finetuning.tools import Tools
from aigiqa_reward.sampling.ancestral import StepWeights, ancestral_weights
from aigiqa_reward.sampling.checks import number
from aigiqa_reward.sampling.schedules import is_flow


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(PolicyGradient):
    """Group relative policy optimisation of flow models.

    Training samples with noise and may take few steps (the paper: 10); the pipeline samples with its own scheduler
    afterwards, without noise and with as many steps as one likes.

    Attributes:
        sampler: "sde" is the paper's Euler-Maruyama step (`flow_sde_weights`); "ancestral" is, for the same noise, the
            step that keeps the marginals at any number of steps (`ancestral_weights`): cleaner images for the reward
            where there are few.
        noise_level: a of sigma_t = a sqrt(t / (1 - t)), in (0, sqrt(2)], where sqrt(2) is "ancestral" with eta=1. The
            default is the paper's.

    Example:
        >>> from aigiqa_reward.finetuning import FlowGRPO
        >>> FlowGRPO(images_per_prompt=8, noise_level=0.7).sampler
        'sde'
    """

    name: ClassVar[str] = "grpo"
    title: ClassVar[str] = "Flow-GRPO"

    advantage_clip: float = 5.0
    sampler: Literal["sde", "ancestral"] = "sde"
    noise_level: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in ("sde", "ancestral"):
            raise ValueError(f"sampler: expected 'sde' or 'ancestral', got {self.sampler!r}")
        # A little above sqrt(2), for those who round.
        number("noise_level", self.noise_level, "in (0, sqrt(2)]; try 0.7", lambda value: 0 < value < 1.4143)

    def check(self, tools: Tools, prompts: Sequence[str]) -> None:
        """Refuse models that are not of flow matching, besides what every policy gradient refuses."""
        pipe = tools.rollout.pipe
        if not is_flow(pipe.scheduler):
            raise ValueError(
                f"pipe: Flow-GRPO trains flow models (SD3, FLUX, ...), got {type(pipe).__name__} with "
                f"{type(pipe.scheduler).__name__}; train it with DDPO (`aigiqa-reward finetune ddpo`), whose sampler "
                "is of any noise schedule"
            )
        super().check(tools, prompts)

    def weights(self, scheduler: Any, step: int) -> StepWeights:
        """Of the sampler that was asked for."""
        if self.sampler == "sde":
            return flow_sde_weights(scheduler, step, self.noise_level)
        return ancestral_weights(scheduler, step, min(1.0, self.noise_level / math.sqrt(2)))

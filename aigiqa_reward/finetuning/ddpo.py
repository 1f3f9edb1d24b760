"""DDPO: policy gradient on the steps of any stochastic sampler, for rewards without gradients.

Black et al. 2024, "Training Diffusion Models with Reinforcement Learning": DDPO-IS with per-prompt statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from aigiqa_reward.finetuning.policy_gradient import PolicyGradient
from aigiqa_reward.sampling.ancestral import StepWeights, ancestral_weights
from aigiqa_reward.sampling.checks import number


@dataclass(frozen=True, kw_only=True)
class DDPO(PolicyGradient):
    """Denoising diffusion policy optimisation.

    The sampler is `ancestral_weights`: DDIM with eta, Euler ancestral, or for flow models one with equal marginals. The
    pipeline may sample with its own scheduler afterwards, with or without noise.

    Attributes:
        eta: noise of the sampler in (0, 1]; 1 as in the paper's code.

    Example:
        >>> from aigiqa_reward.finetuning import DDPO
        >>> DDPO(eta=1.0, images_per_prompt=4).rows_per_prompt
        4
    """

    name: ClassVar[str] = "ddpo"
    title: ClassVar[str] = "DDPO"

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("eta", self.eta, "in (0, 1], without noise a step has no probability; try 1.0", lambda v: 0 < v <= 1)

    def weights(self, scheduler: Any, step: int) -> StepWeights:
        """DDIM's (Song et al. 2021), for every noise schedule."""
        return ancestral_weights(scheduler, step, self.eta)

"""What an algorithm works with: the pipeline's parts, the reward, the reference model, the other processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aigiqa_reward.finetuning.batch import Batch
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.images import HIGHEST, LOWEST
from aigiqa_reward.rewards.bound import BoundReward, device_of, reward_name
from aigiqa_reward.sampling.families import Conditioning
from aigiqa_reward.sampling.rollout import Prediction, Rollout, State
from aigiqa_reward.types import RewardOutput, as_reward_output

if TYPE_CHECKING:
    from accelerate import Accelerator


REMEMBERED = 512
"""Prompts whose conditioning is kept. Chosen here: at FLUX's 4 MB a prompt, 2 GB."""


class TrainingContext:
    """What an algorithm works with.

    Args:
        rollout: of the pipeline, with the arguments that training samples with.
        lora: the trained adapter.
        reward: a Reward or any RewardFunction; frozen.
        accelerator: device, precision and processes.
        checkpointed: keep no activations of denoiser and decoder for the backward pass, compute them again there.
        ceiling: total beyond which an image is not pushed further; None is no ceiling.
        penalty: weight of the distance to the reference model, `kl_coeff`.
    """

    def __init__(
        self,
        *,
        rollout: Rollout,
        lora: LoRA,
        reward: Any,
        accelerator: Accelerator,
        checkpointed: bool = False,
        ceiling: float | None = None,
        penalty: float = 0.0,
    ) -> None:
        self.rollout = rollout
        self.lora = lora
        self.reward = reward
        self.accelerator = accelerator
        self.checkpointed = checkpointed
        self.ceiling = ceiling
        self.penalty = penalty
        self._conditionings: dict[str, Conditioning] = {}
        self._features: tuple[tuple[str, ...], Any] = ((), None)

    # ----------------------------------------------------------------------------------------- the generator

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B rows) of B prompts, each distinct one encoded once, in the text encoders' own precision."""
        distinct = dict.fromkeys(prompts)
        found = {prompt: known for prompt in distinct if (known := self._conditionings.get(prompt)) is not None}
        with torch.autocast(self.rollout.family.device.type, enabled=False):
            found |= {prompt: self.rollout.encode([prompt]) for prompt in distinct if prompt not in found}
        for prompt in found:
            self._conditionings.pop(prompt, None)  # so that the one used last is dropped last
        self._conditionings |= found
        while len(self._conditionings) > REMEMBERED:
            del self._conditionings[next(iter(self._conditionings))]
        return Conditioning.cat([found[prompt] for prompt in prompts])

    def start(self, batch: Batch, purpose: str = "noise") -> State:
        """Noise for the rows of a batch, each from a generator of its own, which also serves a stochastic sampler."""
        return self.rollout.start(self.encode(batch.prompts), batch.generators(purpose))

    def predict(self, state: State, *, alone: bool = False) -> Prediction:
        """The denoiser's prediction, checkpointed as a whole where that is wanted and there are gradients.

        Args:
            state: not done.
            alone: there is no other step with gradients, so that a denoiser that checkpoints its blocks needs no more.
        """
        blocks = alone and bool(getattr(self.lora.denoiser, "is_gradient_checkpointing", False))
        return self.rollout.predict(state, checkpointed=self.checkpointed and torch.is_grad_enabled() and not blocks)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), not clamped; differentiable, checkpointed where that is wanted.

        A decoder that checkpoints its own blocks keeps less than one that is computed again as a whole.
        """
        blocks = bool(getattr(self.rollout.pipe.vae, "is_gradient_checkpointing", False))
        if self.checkpointed and torch.is_grad_enabled() and not blocks:
            images: Any = checkpoint(self.rollout.decode, latents, use_reentrant=False)
            return images
        return self.rollout.decode(latents)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The pipeline without the trained adapter, without gradients."""
        with torch.no_grad(), self.lora.off():
            yield

    def distance(self, state: State, prediction: Prediction) -> Tensor:
        """(B,) mean square of what the adapter changed in the model's output.

        The Kullback-Leibler divergence between a sampler's step and the reference's is this times a factor that
        depends on the step alone. Where the latents depend on the adapter, the reference's output does too.
        """
        if torch.is_grad_enabled() and state.latents.requires_grad:
            with self.lora.off():
                own: Any = self.lora.checkpoint(self.rollout.predict, state)
            own = own.output
        else:
            with self.reference():
                own = self.rollout.predict(state).output
        least = torch.promote_types(own.dtype, torch.float32)
        changed = prediction.output.to(least) - own.to(least)
        return changed.square().flatten(1).mean(dim=1)

    # ----------------------------------------------------------------------------------------- the reward

    def score(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Scores (B,) of images that may leave [0, 1] a little; differentiable, in the reward's own precision."""
        device = device_of(self.reward) or images.device
        # A Reward refuses pixels far outside of [0, 1]; out there they show no difference.
        images = images.clamp(LOWEST, HIGHEST).to(device)
        with torch.autocast(images.device.type, enabled=False):
            images = images if images.dtype == torch.float64 else images.float()
            return as_reward_output(self.reward(images, self._texts(prompts)), len(images))

    def _texts(self, prompts: Sequence[str]) -> Any:
        """Prompts as the reward takes them; those of the last call are kept."""
        if self._features[0] != tuple(prompts):
            self._features = tuple(prompts), BoundReward(self.reward).encode(prompts)
        return self._features[1]

    def try_gradient(self, prompt: str) -> None:
        """Refuse a reward without gradients, by a gray image of a prompt; see `require_gradient`."""
        self.require_gradient(total_of_gray(self.reward, prompt, self.rollout.family.device))

    def require_gradient(self, total: Tensor) -> None:
        """Refuse a reward without gradients.

        Args:
            total: (B,) that it gave of images with gradients.

        Raises:
            ValueError: names the algorithms that take it.
        """
        if not total.requires_grad:
            raise ValueError(
                f"reward: DRaFT and ReFL need its gradients in the images, and {reward_name(self.reward)} gives none; "
                "differentiate it (no torch.no_grad, detach, numpy or PIL inside), or take an algorithm for rewards "
                "without gradients: DPO, DDPO or FlowGRPO"
            )

    def capped(self, total: Tensor) -> Tensor:
        """Totals (B,) whose gradient ends at the ceiling."""
        return total if self.ceiling is None else total.clamp(max=self.ceiling)

    # ----------------------------------------------------------------------------------------- processes

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes, (B,) to (processes * B,), process after process."""
        gathered: Any = self.accelerator.gather(values)
        return gathered


def total_of_gray(reward: Any, prompt: str, device: torch.device) -> Tensor:
    """A reward's total (1,) of a gray image of a prompt, to see whether it has a gradient in the image.

    Args:
        reward: a Reward or any RewardFunction.
        prompt: one that it is going to be asked about: it may know no other.
        device: of the image, where the reward does not say on which it is.
    """
    gray = torch.full((1, 3, 64, 64), 0.5, device=device_of(reward) or device, requires_grad=True)
    return as_reward_output(reward(gray, [prompt]), 1).total

"""Several rewards combined on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.models.base import FullPrecision, check_prompts, distinct_prompts
from aigiqa_reward.rewards.bound import device_of
from aigiqa_reward.rewards.factory import create_reward
from aigiqa_reward.rewards.reward import check_features
from aigiqa_reward.rewards.reward_fn import RewardFn
from aigiqa_reward.types import PromptFeatures, RewardFunction, RewardOutput, as_reward_output, at_least_float32
from aigiqa_reward.utils.isolation import without_autocast


class CompositeReward(nn.Module):
    """A weighted mean of several rewards, whose totals are brought to one scale first if there is a reference.

    The scale comes from a fixed sample of each member's totals, so that a score does not depend on its batch mates.
    `"zscore"` subtracts the sample's mean and divides by its std; `"rank"` gives the share of the sample that lies
    below, linear between neighbors. `quality` and `correspondence` are weighted means, unscaled, over the members that
    give them.

    Args:
        members: rewards or reward functions by name; or weights by the names that `create_reward` knows, as in
            `{"pickscore": 1.0, "hpsv2.1": 0.5}`.
        weights: one number above 0 per member; None weighs all equally.
        combine: "zscore" or "rank".
        reference: (R,) totals of each member on a sample of at least 2 images; `with_reference` measures them. None
            mixes the totals as they are, each on its reward's scale.

    Example:
        >>> import torch
        >>> from aigiqa_reward import CompositeReward, create_reward
        >>> def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        ...     return images.mean(dim=(1, 2, 3))
        >>> members = {"compact": create_reward("compact"), "bright": brightness}
        >>> images, prompts = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["a fox"] * 3
        >>> reward = CompositeReward.with_reference(members, images, prompts, weights={"compact": 3, "bright": 1})
        >>> out = reward(images, prompts)
        >>> out.total.shape, sorted(out.details), bool(out.total.mean().abs() < 1e-4)  # the sample itself has mean 0
        (torch.Size([3]), ['bright', 'compact'], True)
        >>> CompositeReward({"compact": 3.0, "tsp_mgs": 1.0}).weights
        {'compact': 0.75, 'tsp_mgs': 0.25}
    """

    def __init__(
        self,
        members: Mapping[str, RewardFunction] | Mapping[str, float],
        *,
        weights: Mapping[str, float] | None = None,
        combine: str = "zscore",
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if combine not in ("zscore", "rank"):
            raise ValueError(f"combine: expected 'zscore' or 'rank', got {combine!r}")
        if combine == "rank" and reference is None:
            raise ValueError("combine: 'rank' needs a reference, got None; pass one, or use with_reference")
        members, weights = _created(members, weights)
        for argument, given in (("weights", weights), ("reference", reference)):
            if given is not None and given.keys() != members.keys():
                raise ValueError(f"{argument}: expected an entry for each of {sorted(members)}, got {sorted(given)}")
        self.combine = combine
        self._model = f"composite of {', '.join(members)}"
        self.weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        self.members = dict(members)
        try:
            modules = {name: m for name, m in members.items() if isinstance(m, nn.Module)}
            self.member_modules = nn.ModuleDict({_key(name): module for name, module in modules.items()})
            scales = {name: _Reference(name, totals) for name, totals in (reference or {}).items()}
            self.reference = nn.ModuleDict({_key(name): scale for name, scale in scales.items()})
            if len(self.member_modules) < len(modules) or len(self.reference) < len(scales):
                raise KeyError("two names differ by a dot alone")
        except KeyError as error:
            raise ValueError(f"members: not a name for a torch module ({error}); choose another name") from error

    @classmethod
    @without_autocast()
    def with_reference(
        cls,
        members: Mapping[str, RewardFunction] | Mapping[str, float],
        images: Tensor,
        prompts: Sequence[str] | None,
        *,
        weights: Mapping[str, float] | None = None,
        combine: str = "zscore",
    ) -> CompositeReward:
        """Measure the reference on a sample of images (R, 3, H, W) and R prompts like those to be scored.

        A member's total without prompts is its quality, on another scale: pass None here for a reward that will be
        called without prompts.
        """
        members, weights = _created(members, weights)
        with torch.no_grad():
            reference = {name: _call(name, member, images, prompts).total for name, member in members.items()}
        return cls(members, weights=weights, combine=combine, reference=reference)

    @without_autocast()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptFeatures:
        """Encode B prompts once, as `Reward.encode_prompts` does; members that encode none get the strings."""
        check_prompts(prompts)
        texts, index = distinct_prompts(prompts)
        encoders = {name: getattr(member, "encode_prompts", None) for name, member in self.members.items()}
        encoded = {name: encode(list(texts)) for name, encode in encoders.items() if callable(encode)}
        known = {name: features for name, features in encoded.items() if isinstance(features, PromptFeatures)}
        return _MembersFeatures(texts=texts, index=index, tensors={}, model=self._model, members=known)

    @without_autocast()
    def forward(
        self, images: Tensor, prompts: Sequence[str] | PromptFeatures | None = None, *, validate: bool = True
    ) -> RewardOutput:
        """Score a batch (B, 3, H, W) as `Reward` does; `details` holds each member's own total."""
        pixels.check(images, validate=validate)
        given: dict[str, Any] = dict.fromkeys(self.members, prompts)
        if isinstance(prompts, PromptFeatures):
            check_features(prompts, self._model, len(images))
            assert isinstance(prompts, _MembersFeatures)
            own = {
                name: features[prompts.index.to(features.index.device)] for name, features in prompts.members.items()
            }
            given = {**dict.fromkeys(self.members, prompts.prompts), **own}
        outputs = {name: _call(name, member, images, given[name]) for name, member in self.members.items()}
        totals = {name: at_least_float32(output.total) for name, output in outputs.items()}
        if len(self.reference):
            totals = {n: getattr(self.reference[_key(n)], self.combine)(total) for n, total in totals.items()}
        quality = {n: o.quality for n, o in outputs.items() if o.quality is not None}
        correspondence = {n: o.correspondence for n, o in outputs.items() if o.correspondence is not None}
        return RewardOutput(
            total=self._mean(totals),
            quality=self._mean(quality) if quality else None,
            correspondence=self._mean(correspondence) if correspondence else None,
            details={name: output.total for name, output in outputs.items()},
        )

    def as_reward_fn(self) -> RewardFn:
        """Wrap this reward as `Reward.as_reward_fn` does."""
        return RewardFn(self)

    def _mean(self, values: Mapping[str, Tensor]) -> Tensor:
        share = sum(self.weights[name] for name in values)
        device = next(iter(values.values())).device
        parts = [at_least_float32(value).to(device) * (self.weights[n] / share) for n, value in values.items()]
        return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class _MembersFeatures(PromptFeatures):
    """Prompts as several rewards see them; each member encoded the distinct prompts in their order."""

    members: Mapping[str, PromptFeatures]

    def to(self, device: torch.device | str) -> PromptFeatures:
        """Move the features to another device."""
        return replace(self, index=self.index.to(device), members={n: f.to(device) for n, f in self.members.items()})


class _Reference(FullPrecision):
    """The sorted totals of one member on the reference sample."""

    def __init__(self, name: str, totals: Tensor) -> None:
        super().__init__()
        if not isinstance(totals, Tensor):
            raise TypeError(f"reference[{name!r}]: expected a tensor of totals, got {type(totals).__name__}")
        totals = totals.detach().flatten().float().sort().values.clone()
        if len(totals) < 2 or not bool(torch.isfinite(totals).all()) or float(totals[0]) == float(totals[-1]):
            got = totals.tolist()[:5]
            raise ValueError(f"reference[{name!r}]: expected at least 2 finite totals, not all equal, got {got}")
        self.register_buffer("totals", totals)
        self.totals: Tensor

    def zscore(self, total: Tensor) -> Tensor:
        reference = self.totals.to(total)
        return (total - reference.mean()) / reference.std()

    def rank(self, total: Tensor) -> Tensor:
        reference = self.totals.to(total)
        right = torch.searchsorted(reference, total.detach().contiguous(), right=True).clamp(1, len(reference) - 1)
        low, high = reference[right - 1], reference[right]
        gap = high - low  # 0 only where totals that are tied end the sample, at and beyond which there is no slope
        step = torch.where(total.isnan(), total, (total >= high).to(total))
        inside = torch.where(gap > 0, ((total - low) / torch.where(gap > 0, gap, 1)).clamp(0, 1), step.detach())
        return (right - 1 + inside) / (len(reference) - 1)


def _created(
    members: Mapping[str, RewardFunction] | Mapping[str, float], weights: Mapping[str, float] | None
) -> tuple[dict[str, RewardFunction], Mapping[str, float]]:
    """Return rewards and weights; create the rewards where weights are given in their place."""
    numbers = {name: m for name, m in members.items() if isinstance(m, int | float) and not isinstance(m, bool)}
    if numbers and weights is not None:
        raise ValueError("weights: the members are weights already; leave it out")
    rewards = {name: member for name, member in members.items() if callable(member)}
    if not members or len(numbers or rewards) < len(members):
        raise TypeError(
            f"members: expected at least one reward or function by name, or weights by rewards' names, got {members!r}"
        )
    weights = numbers or (dict.fromkeys(members, 1.0) if weights is None else weights)
    if not all(isinstance(weight, int | float) and 0 < weight < float("inf") for weight in weights.values()):
        raise ValueError(f"weights: expected finite numbers above 0, got {dict(weights)}")
    return rewards or {name: create_reward(name) for name in numbers}, weights


def _key(name: str) -> str:
    """Return the name of a member's module, in which torch allows no dot."""
    return name.replace(".", "_")


def _call(name: str, member: RewardFunction, images: Tensor, prompts: Any) -> RewardOutput:
    result = member(images.to(device_of(member) or images.device), prompts)
    return as_reward_output(result, len(images), source=f"member {name!r}")

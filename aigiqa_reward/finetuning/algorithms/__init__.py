"""The algorithms of fine-tuning, by their names on the command line."""

from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.algorithms.dpo import DPO
from aigiqa_reward.finetuning.algorithms.draft import DRaFT
from aigiqa_reward.finetuning.algorithms.nft import DiffusionNFT
from aigiqa_reward.finetuning.algorithms.policy_gradient import DDPO, FlowGRPO
from aigiqa_reward.finetuning.algorithms.refl import ReFL

ALGORITHMS: dict[str, type[Algorithm]] = {kind.name: kind for kind in (DRaFT, ReFL, DPO, DDPO, FlowGRPO, DiffusionNFT)}
"""Algorithms by their names on the command line."""

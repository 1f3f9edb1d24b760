"""Reward fine-tuning of diffusers pipelines with LoRA: one training loop, one file of mathematics per algorithm.

Example:
    >>> from aigiqa_reward import create_reward, load_embedded_pipeline
    >>> from aigiqa_reward.finetuning import ALGORITHMS, DPO, DRaFT, FinetuneConfig, FinetuneResult, finetune
    >>> from aigiqa_reward.finetuning import build_preference_pairs, read_preference_pairs
    >>> sorted(ALGORITHMS)
    ['ddpo', 'dpo', 'draft', 'grpo', 'nft', 'refl']
    >>> pipe, reward = load_embedded_pipeline(), create_reward("compact")
    >>> prompts = ["a red apple on a blue background", "a cat on a green background"]
    >>> sampling = {"num_inference_steps": 2, "guidance_scale": 1.0}
    >>> config = FinetuneConfig(max_train_steps=2, train_batch_size=2, sampling=sampling)
    >>> result: FinetuneResult = finetune(pipe, reward, prompts, DRaFT(), "draft/", config, progress=False)
    >>> result.steps, result.stopped, len(result.history)
    (2, None, 2)
    >>> fresh = load_embedded_pipeline()
    >>> fresh.load_lora_weights(result.folder)
    >>> fresh(prompts[0], **sampling).images[0].size
    (64, 64)

    >>> pipe = load_embedded_pipeline()
    >>> pairs = build_preference_pairs(pipe, reward, prompts, "pairs/", n=2, progress=False, **sampling)
    >>> pairs.prompts == read_preference_pairs("pairs/").prompts
    True
    >>> finetune(pipe, reward, pairs, DPO(), "dpo/", config, progress=False).steps
    2
"""

from aigiqa_reward.finetuning.algorithms import ALGORITHMS
from aigiqa_reward.finetuning.algorithms.dpo import DPO
from aigiqa_reward.finetuning.algorithms.draft import DRaFT
from aigiqa_reward.finetuning.algorithms.nft import DiffusionNFT
from aigiqa_reward.finetuning.algorithms.policy_gradient import DDPO, FlowGRPO
from aigiqa_reward.finetuning.algorithms.refl import ReFL
from aigiqa_reward.finetuning.callbacks import TrainingCallback
from aigiqa_reward.finetuning.config import FinetuneConfig
from aigiqa_reward.finetuning.optimizers import FinetuningError
from aigiqa_reward.finetuning.pairs import build_preference_pairs, read_preference_pairs
from aigiqa_reward.finetuning.results import FinetuneResult
from aigiqa_reward.finetuning.run import finetune
from aigiqa_reward.finetuning.sharding import shard_denoiser

__all__ = [
    "ALGORITHMS",
    "DDPO",
    "DPO",
    "DRaFT",
    "DiffusionNFT",
    "FinetuneConfig",
    "FinetuneResult",
    "FinetuningError",
    "FlowGRPO",
    "ReFL",
    "TrainingCallback",
    "build_preference_pairs",
    "finetune",
    "read_preference_pairs",
    "shard_denoiser",
]

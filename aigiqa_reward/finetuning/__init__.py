"""Reward fine-tuning of diffusers pipelines with LoRA: one loop, and a small file of maths for each algorithm.

Example:
    >>> from aigiqa_reward import create_reward, load_embedded_pipeline
    >>> from aigiqa_reward.finetuning import ALGORITHMS, Draft, FinetuneResult, FinetuneSettings, finetune
    >>> sorted(ALGORITHMS)
    ['ddpo', 'dpo', 'draft', 'grpo', 'refl']
    >>> pipe, reward = load_embedded_pipeline(), create_reward("compact")
    >>> prompts = ["a red apple on a blue background", "a cat on a green background"]
    >>> sampling = {"num_inference_steps": 2, "guidance_scale": 1.0}
    >>> settings = FinetuneSettings(max_train_steps=2, train_batch_size=2, sampling=sampling)
    >>> result: FinetuneResult = finetune(pipe, reward, prompts, Draft(), "draft/", settings, progress=False)
    >>> result.steps, result.stopped, len(result.history)
    (2, None, 2)
    >>> fresh = load_embedded_pipeline()
    >>> fresh.load_lora_weights(result.folder)
    >>> fresh(prompts[0], **sampling).images[0].size
    (64, 64)
    >>> from aigiqa_reward.finetuning import DPO, build_preference_pairs, read_preference_pairs
    >>> pipe = load_embedded_pipeline()
    >>> pairs = build_preference_pairs(pipe, reward, prompts, "pairs/", n=2, progress=False, **sampling)
    >>> pairs.prompts == read_preference_pairs("pairs/").prompts
    True
    >>> finetune(pipe, reward, [], DPO(pairs=pairs), "dpo/", settings, progress=False).steps
    2
"""

from aigiqa_reward.finetuning.algorithm import Algorithm
from aigiqa_reward.finetuning.ddpo import DDPO
from aigiqa_reward.finetuning.dpo import DPO
from aigiqa_reward.finetuning.draft import Draft
from aigiqa_reward.finetuning.grpo import FlowGRPO
from aigiqa_reward.finetuning.launch import finetune
from aigiqa_reward.finetuning.optimisation import FinetuningError
from aigiqa_reward.finetuning.pairs import build_preference_pairs, read_preference_pairs
from aigiqa_reward.finetuning.refl import ReFL
from aigiqa_reward.finetuning.result import FinetuneResult
from aigiqa_reward.finetuning.settings import FinetuneSettings

ALGORITHMS: dict[str, type[Algorithm]] = {kind.name: kind for kind in (Draft, ReFL, DPO, DDPO, FlowGRPO)}
"""By the names that the command line has for them."""

__all__ = [
    "ALGORITHMS",
    "DDPO",
    "DPO",
    "Draft",
    "FinetuneResult",
    "FinetuneSettings",
    "FinetuningError",
    "FlowGRPO",
    "ReFL",
    "build_preference_pairs",
    "finetune",
    "read_preference_pairs",
]

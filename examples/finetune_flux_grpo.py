"""Fine-tune FLUX.1 [dev] with Flow-GRPO by a reward without gradients.

python examples/finetune_flux_grpo.py prompts.txt        # one prompt a line

`score` may be any function of images and prompts: a detector, OCR, a web service. Here it is the compact reward with a
preference for dark images. Training samples few steps with noise; the trained pipeline samples as usual.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from aigiqa_reward import create_reward
from aigiqa_reward.finetuning import FinetuneConfig, FinetuneResult, FlowGRPO, finetune

MODEL = "black-forest-labs/FLUX.1-dev"


def load() -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16, use_safetensors=True)
    return pipe.to("cuda")


def main(
    prompts: list[str],
    out: Path,
    *,
    steps: int = 300,
    images_per_prompt: int = 8,
    batch_size: int = 8,
    accumulation: int = 4,
    sampling_steps: int = 10,
    side: int = 512,
    pipe: Any = None,
) -> FinetuneResult:
    pipe = pipe or load()
    judge = create_reward("compact", device=pipe.device)

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and their prompts to scores (B,)."""
        return judge(images, prompts).total - 0.1 * images.mean(dim=(1, 2, 3))

    config = FinetuneConfig(
        rank=32,
        train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=True,
        mixed_precision="bf16",
        max_train_steps=steps,
        kl_coeff=0.04,
        sampling={"num_inference_steps": sampling_steps, "guidance_scale": 3.5, "height": side, "width": side},
    )
    algorithm = FlowGRPO(images_per_prompt=images_per_prompt, timestep_fraction=0.6)
    result = finetune(pipe, score, prompts, algorithm, out, config, resume_from_checkpoint="latest")
    rewards = [line["reward"] for line in result.history if "reward" in line]
    print(f"mean reward of the samples: {rewards[0]:.4f} in the first step, {rewards[-1]:.4f} in the last")
    print(f"pipe.load_lora_weights({str(out)!r})")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("flux-grpo"))
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    main(given.prompts.read_text(encoding="utf-8").splitlines(), given.out, steps=given.steps)

"""Fine-tune Stable Diffusion XL with DRaFT-1: the reward's gradient through the last sampling step and the decoder.

python examples/finetune_sdxl_draft.py prompts.txt validation.txt        # one prompt a line

The same call resumes from the last checkpoint; under accelerate launch or torchrun several GPUs share each step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from aigiqa_reward import create_reward
from aigiqa_reward.finetuning import DRaFT, FinetuneConfig, FinetuneResult, finetune

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


def load() -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16, use_safetensors=True)
    return pipe.to("cuda")


def main(
    prompts: list[str],
    validation_prompts: list[str],
    out: Path,
    *,
    steps: int = 200,
    rank: int = 16,
    images: int = 8,
    seeds: int = 4,
    sampling_steps: int = 30,
    guidance_scale: float = 5.0,
    pipe: Any = None,
) -> FinetuneResult:
    pipe = pipe or load()
    config = FinetuneConfig(
        rank=rank,
        train_batch_size=1,
        gradient_accumulation_steps=images,  # one image each
        gradient_checkpointing=True,
        mixed_precision="bf16",
        max_train_steps=steps,
        validation_steps=max(steps // 4, 1),
        validation_seeds=seeds,
        checkpointing_steps=max(steps // 4, 1),
        sampling={"num_inference_steps": sampling_steps, "guidance_scale": guidance_scale},
    )
    result = finetune(
        pipe,
        create_reward("compact", device=pipe.device),
        prompts,
        DRaFT(truncation_steps=1),
        out,
        config,
        validation_prompts=validation_prompts,
        resume_from_checkpoint="latest",
    )
    seen = {line["step"]: line["validation"] for line in result.history if "validation" in line}
    for name in ("reward", "holdout"):
        print(f"{name}: {seen[0][name]:.4f} before, {seen[result.kept_step][name]:.4f} after")
    print(f"kept: step {result.kept_step} of {result.steps}; pipe.load_lora_weights({str(out)!r})")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("validation_prompts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sdxl-draft"))
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    texts, watched = (f.read_text(encoding="utf-8").splitlines() for f in (given.prompts, given.validation_prompts))
    main(texts, watched, given.out, steps=given.steps)

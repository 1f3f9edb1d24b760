"""Fine-tune Stable Diffusion 1.5 with Diffusion-DPO on pairs of its own images, compared by the reward.

python examples/finetune_sd15_dpo.py prompts.txt        # one prompt a line

The reward needs no gradient: any function f(images, prompts) -> scores will do. The same call resumes an interrupted
run, both the sampling of pairs and the training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from aigiqa_reward import create_reward
from aigiqa_reward.finetuning import DPO, FinetuneConfig, FinetuneResult, build_preference_pairs, finetune

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def load() -> Any:
    return DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, use_safetensors=True).to("cuda")


def main(
    prompts: list[str],
    out: Path,
    *,
    n: int = 8,
    steps: int = 500,
    margin: float = 0.01,
    beta: float = 2000.0,
    sampling_steps: int = 30,
    guidance_scale: float = 7.5,
    pipe: Any = None,
) -> FinetuneResult:
    pipe = pipe or load()
    pipe.set_progress_bar_config(disable=True)
    reward = create_reward("compact", device=pipe.device)
    sampling = {"num_inference_steps": sampling_steps, "guidance_scale": guidance_scale}
    held_out = max(len(prompts) // 10, 1)  # the first prompts are for validation
    pairs = build_preference_pairs(pipe, reward, prompts[held_out:], out / "pairs", n=n, margin=margin, **sampling)
    print(f"{len(pairs)} pairs of {len(prompts) - held_out} prompts")
    config = FinetuneConfig(
        train_batch_size=4,
        gradient_accumulation_steps=4,
        max_train_steps=steps,
        validation_steps=max(steps // 5, 1),
        mixed_precision="bf16",
        sampling=sampling,
    )
    result = finetune(
        pipe,
        reward,
        pairs,
        DPO(beta=beta),
        out / "lora",
        config,
        validation_prompts=prompts[:held_out],
        resume_from_checkpoint="latest",
    )
    accuracy = [line["accuracy"] for line in result.history if "accuracy" in line]
    print(f"implicit accuracy, 1/2 before: {sum(accuracy[-20:]) / len(accuracy[-20:]):.3f} in the last steps")
    print(f"kept: step {result.kept_step} of {result.steps}; pipe.load_lora_weights({str(out / 'lora')!r})")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sd15-dpo"))
    parser.add_argument("--n", type=int, default=8)
    given = parser.parse_args()
    main(given.prompts.read_text(encoding="utf-8").splitlines(), given.out, n=given.n)

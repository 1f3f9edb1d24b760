"""Best of N with Stable Diffusion XL: four good images that differ, with weights for quality and correspondence.

python examples/best_of_n_sdxl.py "a lighthouse in a storm, oil painting" --quality-weight 0.7
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from aigiqa_reward import BestOfN, BestOfNOutput, create_reward
from aigiqa_reward.report import contact_sheet

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"


def load() -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16, use_safetensors=True)
    return pipe.to("cuda")


def main(
    prompt: str,
    out: Path,
    *,
    n: int = 16,
    top_k: int = 4,
    steps: int = 30,
    guidance_scale: float = 6.0,
    quality_weight: float = 0.5,
    pipe: Any = None,
) -> BestOfNOutput:
    pipe = pipe or load()
    pipe.set_progress_bar_config(disable=True)
    reward = create_reward(
        "compact", quality_weight=quality_weight, correspondence_weight=1 - quality_weight, device=pipe.device
    )
    search = BestOfN(pipe, reward, n=n, top_k=top_k, batch_size=4, diverse=True)
    result = search(
        prompt,
        seed=0,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt="blurry, low quality",
    )
    out.mkdir(parents=True, exist_ok=True)
    for rank, image in enumerate(result.images, start=1):
        image.save(out / f"{rank:02d}_seed{result.seeds[rank - 1]}.png")
    contact_sheet(result, prompt, kept_only=True).save(out / "contact-sheet.png")
    for seed, total, quality in zip(result.seeds, result.scores, result.quality, strict=True):
        print(f"seed {seed}: total {total:.3f}, quality {quality:.3f}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--quality-weight", type=float, default=0.5, help="from 0 to 1; the rest is correspondence")
    parser.add_argument("--out", type=Path, default=Path("best-of-n-sdxl"))
    given = parser.parse_args()
    main(given.prompt, given.out, n=given.n, quality_weight=given.quality_weight)

"""Best of N with Stable Diffusion 1.5 and pruning: candidates with poor previews are dropped early, at half the cost.

python examples/best_of_n_sd15.py "a red fox in the snow" --n 16
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from aigiqa_reward import BestOfN, BestOfNOutput, create_reward
from aigiqa_reward.report import write_page

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def load() -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    return DiffusionPipeline.from_pretrained(MODEL, torch_dtype=dtype, use_safetensors=True).to(device)


def main(
    prompt: str,
    out: Path,
    *,
    n: int = 16,
    top_k: int = 4,
    steps: int = 30,
    guidance_scale: float = 7.5,
    pipe: Any = None,
) -> BestOfNOutput:
    pipe = pipe or load()
    pipe.set_progress_bar_config(disable=True)
    reward = create_reward("compact", device=pipe.device)
    search = BestOfN(pipe, reward, n=n, top_k=top_k, batch_size=4, pruning="halving")
    result = search(prompt, seed=0, num_inference_steps=steps, guidance_scale=guidance_scale)
    out.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(result.seeds, result.images, strict=True):
        image.save(out / f"seed{seed}.png")  # the seed reproduces the image
    write_page([(prompt, result)], out / "index.html")
    plain = n * steps
    print(f"best: seed {result.seeds[0]}, reward {result.scores[0]:.3f}")
    print(f"{result.denoiser_calls} denoiser calls instead of {plain}; everything is in {out}/index.html")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("best-of-n-sd15"))
    given = parser.parse_args()
    main(given.prompt, given.out, n=given.n)

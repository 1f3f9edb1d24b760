"""Best of N with FLUX.1 [schnell] for several prompts: four steps per candidate, with model CPU offload.

python examples/best_of_n_flux.py "a red fox in the snow" "a teapot made of glass"

The same call resumes an interrupted run; under torchrun the processes share the prompts:
torchrun --nproc_per_node 4 examples/best_of_n_flux.py ...
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from aigiqa_reward import BestOfN, create_reward
from aigiqa_reward.report import write_page
from aigiqa_reward.sampling import best_of_each

MODEL = "black-forest-labs/FLUX.1-schnell"
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def load() -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16, use_safetensors=True)
    pipe.enable_model_cpu_offload(device=DEVICE)
    return pipe


def main(
    prompts: list[str],
    out: Path,
    *,
    n: int = 8,
    steps: int = 4,
    guidance_scale: float = 0.0,
    pipe: Any = None,
    device: str = DEVICE,
) -> Path:
    pipe = pipe or load()
    pipe.set_progress_bar_config(disable=True)
    search = BestOfN(pipe, create_reward("compact", device=device), n=n, top_k=2, batch_size=2)
    results = best_of_each(search, prompts, out, seed=0, num_inference_steps=steps, guidance_scale=guidance_scale)
    for result in results:
        assert result.output is not None, "best_of_each raises if a prompt failed"
        print(f"{result.prompt}: seed {result.output.seeds[0]}, reward {result.output.scores[0]:.3f}")
    found = ((result.prompt, result.output) for result in results if result.output is not None)
    return write_page(found, out / "index.html", title="FLUX.1 [schnell], best of N")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("best-of-n-flux"))
    given = parser.parse_args()
    print(main(given.prompts, given.out, n=given.n))

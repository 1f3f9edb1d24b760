"""Gains of steering by the reward's gradient where the generator fails, beside best of N: reward, held-out and judge.

    python tests/benchmarks/guidance.py --steps 3 --runs runs/guidance-3

`RewardGuidance` at the clean image, which takes no more denoiser calls than one image: with the plain gradient, that of
the smoothed reward (two draws), and that at the worst image of a small ball. 40 prompts of pairs that neither generator
nor reward ever saw, 8 images each from the same noise. Results in --runs are reused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from finetuning import (
    BASE_IMAGES,
    COLUMNS,
    FIRST_SEED,
    IMAGES,
    RECIPES,
    RESULTS,
    Models,
    all_shown,
    base_report,
    measured,
    table,
)
from rounds import parsed, parser_of

from aigiqa_reward import SmoothedReward, create_reward, load_embedded_pipeline
from aigiqa_reward.finetuning.validation import default_holdout
from aigiqa_reward.rewards.smooth import IMAGE_RADIUS
from aigiqa_reward.sampling import RewardGuidance
from aigiqa_reward.toy.judge import load_judge
from aigiqa_reward.utils.run_folder import RunFolder, digest, pipeline_identity, reward_identity


@dataclass(frozen=True, kw_only=True)
class Guided(Models):
    guide: Any
    options: dict[str, Any] = field(default_factory=dict)

    @torch.enable_grad()
    def images(self, prompt: str, count: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(FIRST_SEED + place) for place in range(count)]
        call = {"num_inference_steps": self.steps, "guidance_scale": 1.0, "output_type": "pt"}
        with RewardGuidance(self.pipe, self.guide, prompt, **self.options) as guidance:
            prompts = [prompt] * count
            return self.pipe(prompts, generator=generators, callback_on_step_end=guidance, **call).images


def main() -> None:
    parser = parser_of(__doc__, threads=1)
    parser.add_argument("--steps", type=int, default=3, help="sampling steps")
    parser.add_argument("--runs", type=Path, default=Path("runs/guidance"), help="folder of results")
    given = parsed(parser)
    reward, pipe = create_reward("compact"), load_embedded_pipeline()
    parts: dict[str, Any] = {"pipe": pipe, "reward": reward, "judge": load_judge(), "steps": given.steps}
    parts["holdout"] = default_holdout(reward)
    settings = {"steps": given.steps, "generator": digest(pipeline_identity(pipe)), "reward": reward_identity(reward)}
    RunFolder(given.runs, argument="--runs", contents=RESULTS).begin(settings)
    prompts, figures = (RECIPES / "held-out.txt").read_text().splitlines(), given.runs / "figures"
    base = measured(Models(**parts), prompts, figures / "base-new.safetensors", BASE_IMAGES)
    print(f"{given.steps} steps; of best of N the gain over one image.\n\n{base_report(base)}", flush=True)
    rows = {}
    for name, guide, options in (
        ("plain", reward, {}),
        ("smoothed", SmoothedReward(reward), {}),
        ("sharpness-aware", reward, {"image_radius": IMAGE_RADIUS}),
    ):
        models = Guided(**parts, guide=guide, options=options)
        values = measured(models, prompts, figures / f"{name}.safetensors", IMAGES)
        rows[name] = all_shown((values - base[:, :IMAGES]).mean(axis=1))
    print(f"Guidance, gain over the same images without it:\n\n{table(rows, COLUMNS)}")


if __name__ == "__main__":
    main()

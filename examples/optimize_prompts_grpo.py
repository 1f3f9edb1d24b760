"""Train a language model to rewrite prompts so that an image generator makes better images from them (trl's GRPO).

Images are scored against the original prompt. `pip install ".[trl]" ./integrations/trl`, then

python examples/optimize_prompts_grpo.py prompts.txt        # one prompt a line; or accelerate launch examples/...
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from aigiqa_reward_trl import RewriteReward
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from aigiqa_reward import create_reward
from aigiqa_reward.sampling import PromptScorer

WRITER = "Qwen/Qwen2.5-0.5B-Instruct"
GENERATOR = "stabilityai/sdxl-turbo"
TASK = "Rewrite this prompt for an image generator. Answer with the new prompt only.\n\n"


def load() -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(GENERATOR, torch_dtype=torch.bfloat16, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(PartialState().device)  # each process has its own


def main(
    prompts: list[str],
    out: Path,
    *,
    steps: int = 200,
    rewrites: int = 8,
    sampling_steps: int = 4,
    guidance_scale: float = 0.0,
    pipe: Any = None,
    writer: Any = WRITER,
    tokenizer: Any = None,
    length: int = 64,  # tokens; CLIP reads 77
    learning_rate: float = 1e-5,
) -> list[float]:
    pipe = pipe or load()
    judge = create_reward("compact", device=pipe.device)
    sampling = {"num_inference_steps": sampling_steps, "guidance_scale": guidance_scale}
    reward = RewriteReward(PromptScorer(pipe, judge, batch_size=rewrites, **sampling), fresh_noise=True)
    asked = [[{"role": "user", "content": TASK + prompt}] for prompt in prompts]
    data = Dataset.from_dict({"prompt": asked, "original": prompts})
    args = GRPOConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2 * rewrites,
        num_generations=rewrites,
        max_completion_length=length,
        learning_rate=learning_rate,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
    )
    lora: Any = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(writer, reward, args, data, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    print(f"mean reward of the rewrites: {rewards[0]:.4f} in the first step, {rewards[-1]:.4f} in the last; see {out}")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("prompt-writer"))
    given = parser.parse_args()
    main(given.prompts.read_text(encoding="utf-8").splitlines(), given.out)

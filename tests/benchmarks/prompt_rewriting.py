"""Does GRPO learn from the reward of rewrites? A tiny language model adds a word to prompts of the embedded world.

    python tests/benchmarks/prompt_rewriting.py --seeds 3

The language model (Qwen3's class, two layers, random weights) reads "penguin" and writes one word, which gives "a
penguin, WORD background"; a word that is no color makes nonsense, and ending at once adds nothing. It is trained by
trl's GRPOTrainer with `RewriteReward`: the compact reward of the generated image, scored against "a penguin". All
rewrites can be scored, so the expected reward is exact: the mean over all words by their probability. It is shown
for things in and outside of the training, at the trained noise and at another, before training, after, and for the
original prompt; in brackets the minimum and maximum over the language models.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rounds import parsed, parser_of

from aigiqa_reward import create_reward, load_embedded_pipeline
from aigiqa_reward.sampling import PromptScorer
from aigiqa_reward.toy.world import COLOR_NAMES, NOUNS

ROOT = Path(__file__).resolve().parents[2]
CALL = {"num_inference_steps": 6, "guidance_scale": 1.0}
NOISES = {"trained noise": 0, "another noise": 1}
GROUPS, REWRITES = 8, 8


def compose(original: str, word: str) -> str:
    return f"{original}, {word} background" if word else original


def question(original: str) -> str:
    return original.removeprefix("a ")


def writer(tokenizer: Any, seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def train(model: Any, tokenizer: Any, scorer: PromptScorer, originals: list[str], steps: int, seed: int) -> None:
    from aigiqa_reward_trl import RewriteReward
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=steps, max_steps=steps,
            per_device_train_batch_size=GROUPS * REWRITES, num_generations=REWRITES, max_completion_length=1,
            learning_rate=2e-3, seed=seed,
        )  # fmt: skip
        reward = RewriteReward(scorer, compose=compose)
        rows = originals * GROUPS  # one step; with fewer rows trl silently trains on none
        data = Dataset.from_dict({"prompt": [question(original) for original in rows], "original": rows})
        GRPOTrainer(model, reward, args, data, processing_class=tokenizer).train()


@torch.no_grad()
def earned(model: Any, tokenizer: Any, scorer: PromptScorer, originals: list[str], noise: int) -> float:
    """Mean over the originals and over all words, each by its probability."""
    model.eval()
    words = ["" if token in tokenizer.all_special_tokens else token for token in vocabulary(tokenizer)]
    means = []
    for original in originals:
        ids = tokenizer(question(original), return_tensors="pt").input_ids
        shares = model(ids).logits[0, -1].double().softmax(dim=-1)
        scores = scorer.score([compose(original, word) for word in words], [original] * len(words), seed=noise)
        means.append(float(shares @ torch.tensor([score.total for score in scores], dtype=torch.float64)))
    return sum(means) / len(means)


def vocabulary(tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def main() -> None:
    parser = parser_of(__doc__, threads=1)
    parser.add_argument("--seeds", type=int, default=3, help="language models to train")
    parser.add_argument("--steps", type=int, default=60)
    given = parsed(parser)
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "integrations" / "trl")]
    from tiny_language_models import word_tokenizer

    nouns = random.Random(0).sample([noun for noun in NOUNS if " " not in noun and noun[0] not in "aeiou"], 6)
    splits = {"trained things": [f"a {noun}" for noun in nouns[:3]], "held-out things": [f"a {n}" for n in nouns[3:]]}
    originals = [original for things in splits.values() for original in things]
    tokenizer = word_tokenizer([*nouns, *COLOR_NAMES])
    scorer = PromptScorer(load_embedded_pipeline(), create_reward("compact"), batch_size=16, **CALL)
    started = time.process_time()
    cells = [(things, noise) for things in splits for noise in NOISES]

    def line(name: str, values: list[list[float]]) -> None:
        shown = [f"{sum(v) / len(v):.4f}" + (f" [{min(v):.4f}, {max(v):.4f}]" if len(v) > 1 else "") for v in values]
        print("|", " | ".join([name, *shown]), "|", flush=True)

    print("| |", " | ".join(f"{things}, {noise}" for things, noise in cells), "|")
    print("| ---", "| ---: " * len(cells), "|", sep="")
    table = {cell: best_and_none(scorer, tokenizer, splits[cell[0]], NOISES[cell[1]]) for cell in cells}
    line("the original", [[table[cell][0]] for cell in cells])
    scored = time.process_time() - started
    models = [writer(tokenizer, seed) for seed in range(given.seeds)]

    def all_earned() -> list[list[float]]:
        return [[earned(m, tokenizer, scorer, splits[t], NOISES[n]) for m in models] for t, n in cells]

    line("random language model", all_earned())
    for seed, model in enumerate(models):
        train(model, tokenizer, scorer, splits["trained things"], given.steps, seed)
    line(f"after {given.steps} steps of GRPO", all_earned())
    line("the best word for each", [[table[cell][1]] for cell in cells])
    for model in models:
        likeliest = [
            int(model(tokenizer(question(o), return_tensors="pt").input_ids).logits[0, -1].argmax()) for o in originals
        ]
        print("likeliest words:", ", ".join(tokenizer.convert_ids_to_tokens(likeliest)))
    total = time.process_time() - started
    print(
        f"{scored / 60:.1f} CPU minutes of scoring all rewrites, {(total - scored) / 60:.1f} of {given.seeds} trainings"
    )


def best_and_none(scorer: PromptScorer, tokenizer: Any, originals: list[str], noise: int) -> tuple[float, float]:
    """What the originals earn as they are, and with the word that is best for each at this noise."""
    words = ["", *(token for token in vocabulary(tokenizer) if token not in tokenizer.all_special_tokens)]
    rows = [scorer.score([compose(o, w) for w in words], [o] * len(words), seed=noise) for o in originals]
    mean = len(rows)
    return sum(row[0].total for row in rows) / mean, sum(max(s.total for s in row) for row in rows) / mean


if __name__ == "__main__":
    main()

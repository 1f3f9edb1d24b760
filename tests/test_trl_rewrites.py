"""Rewrites of prompts under trl's GRPOTrainer, with the embedded generator and a tiny language model of words."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aigiqa_reward_trl import RewriteReward
from prompt_rewrites import APPLE, CROWN, PENGUIN, SETTINGS, Seen, Spoilt
from tiny_language_models import qwen_3, word_tokenizer

from aigiqa_reward import BestOfN, create_reward, load_embedded_pipeline
from aigiqa_reward.sampling import PromptScorer
from aigiqa_reward.toy.world import COLOR_NAMES

ORIGINALS = ["a red apple", "a penguin", "a crown", "a ghost"]
WORDS = ["rewrite:", *" ".join(ORIGINALS).split(), "on", "background", *COLOR_NAMES]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_embedded_pipeline()


def said(text: str | None) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_a_rewrite_is_judged_by_its_image_against_the_original(pipe: Any) -> None:
    reward = Seen()
    score = RewriteReward(PromptScorer(pipe, reward, **SETTINGS))
    prompts, completions = ["rewrite it"] * 2, [f" {APPLE}\n", PENGUIN]
    got = score(prompts=prompts, completions=completions, completion_ids=[[1], [2]], original=["ab", "cde"], x=[1, 2])
    assert reward.texts == ["ab", "cde"]
    expected = PromptScorer(pipe, Seen(), **SETTINGS).score([APPLE, PENGUIN], ["ab", "cde"])
    assert got == pytest.approx([one.total for one in expected], abs=1e-6)
    assert all(isinstance(one, float) for one in got)
    RewriteReward(score.scorer, judged_by="rewrite")(prompts, completions, original=["ab", "cde"])
    assert reward.texts[2:] == [APPLE, PENGUIN]


def test_conversations_say_the_same_as_texts(pipe: Any) -> None:
    score = RewriteReward(PromptScorer(pipe, Seen(), **SETTINGS))
    expected = score([""] * 3, [APPLE, APPLE, ""], original=["ab"] * 3)
    blocks = [{"role": "assistant", "content": [{"type": "text", "text": "a red "}, {"type": "text", "text": "apple"}]}]
    thinking = [{"role": "assistant", "content": "hm"}, {"role": "tool", "content": "4"}, *said(APPLE)]
    assert score([[]] * 3, [blocks, thinking, said(None)], original=["ab"] * 3) == expected
    with pytest.raises(TypeError, match="expected texts or conversations, got int"):
        score([""], [3], original=["ab"])


def test_what_was_written_is_read_as_the_user_says(pipe: Any) -> None:
    score = RewriteReward(
        PromptScorer(pipe, Seen(), **SETTINGS),
        compose=lambda original, completion: f"{original} {completion.rpartition('</think>')[2]}",
        original_column="image_prompt",
    )
    extra: dict[str, list[Any]] = {}
    score([""] * 2, ["so </think>on white", ""], image_prompt=["a crown"] * 2, log_extra=extra.__setitem__)
    assert extra["rewrite"] == [CROWN, "a crown"]
    with pytest.raises(ValueError, match=r"expected a column 'image_prompt' in the dataset, got \['original'\]"):
        score([""], ["x"], original=["a crown"])
    with pytest.raises(TypeError, match=r"image_prompt\[0\]: expected a text, got list"):
        score([""], ["x"], image_prompt=[said("a crown")])


def test_rewrites_at_fault_get_the_floor_and_images_that_failed_get_none(pipe: Any) -> None:
    scorer = PromptScorer(Spoilt(pipe, nan=PENGUIN, flagged=CROWN), Seen(), **SETTINGS)
    metrics: dict[str, float] = {}
    rewrites = [APPLE, " ", PENGUIN, CROWN]
    rewards = RewriteReward(scorer, floor=-1.0)(
        rewrites, rewrites, original=["abc"] * 4, log_metric=metrics.__setitem__
    )
    [good] = PromptScorer(pipe, Seen(), **SETTINGS).score([APPLE], ["abc"])
    assert rewards == [pytest.approx(good.total, abs=1e-6), -1.0, None, -1.0]
    expected = {"quality": good.quality, "correspondence": 3.0, "blank": 1 / 4, "dropped": 2 / 3, "cached": 0.0}
    assert metrics == pytest.approx({f"rewrite/{name}": value for name, value in expected.items()}, abs=1e-6)
    assert RewriteReward(scorer, floor=None)(rewrites, rewrites, original=["abc"] * 4)[1:] == [None] * 3
    nothing: dict[str, float] = {}
    assert RewriteReward(scorer)([""], [""], original=["abc"], log_metric=nothing.__setitem__) == [0.0]
    assert nothing.keys() == metrics.keys(), "every process logs the same names, or trl's gathering would mix them up"
    assert math.isnan(nothing["rewrite/quality"])


def test_a_rewrite_that_the_reward_cannot_read_gets_the_floor_where_it_judges(pipe: Any) -> None:
    scorer = PromptScorer(pipe, create_reward("compact"), **SETTINGS)
    rewrites, originals = ["\ufffd", APPLE, "\u200b"], ["an apple"] * 3
    metrics: dict[str, float] = {}
    got = RewriteReward(scorer, judged_by="rewrite", floor=-1.0)(
        rewrites, rewrites, original=originals, log_metric=metrics.__setitem__
    )
    [readable] = scorer.score([APPLE])
    assert got == [-1.0, pytest.approx(readable.total, abs=1e-6), -1.0]
    assert metrics["rewrite/blank"] == pytest.approx(2 / 3)
    assert RewriteReward(scorer, judged_by="rewrite")(["\ufffd"], ["\ufffd"], original=["an apple"]) == [0.0]
    assert all(isinstance(one, float) for one in RewriteReward(scorer)(rewrites, rewrites, original=originals))
    with pytest.raises(ValueError, match="no readable word"):
        RewriteReward(scorer)([APPLE], [APPLE], original=["\ufffd"])  # the dataset is at fault, not the rewrite


def test_noise_is_shared_and_stays_or_is_fresh_every_step(pipe: Any) -> None:
    reward = Seen()
    search = PromptScorer(BestOfN(pipe, reward, n=2), **SETTINGS)
    fixed, fresh = RewriteReward(search, seed=5), RewriteReward(search, seed=5, fresh_noise=True)

    def judged(score: RewriteReward, step: int) -> float | None:
        [one, other] = score(
            [""] * 2, [APPLE] * 2, original=["ab"] * 2, trainer_state=SimpleNamespace(global_step=step)
        )
        assert one == other
        return one

    first, count = judged(fixed, 0), len(reward.texts)
    assert (judged(fixed, 1), judged(fresh, 0), len(reward.texts)) == (first, first, count)
    [expected] = search.score([APPLE], ["ab"], seed=5 + 3 * 2)
    assert judged(fresh, 3) == expected.total != first


def test_arguments_are_checked(pipe: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a PromptScorer\(pipe, reward, ...\), got Seen"):
        RewriteReward(Seen())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="judged_by: expected 'original' or 'rewrite', got 'image'"):
        RewriteReward(PromptScorer(pipe, Seen()), judged_by="image")  # pyright: ignore[reportArgumentType]


def train(reward: RewriteReward, folder: Path, conversational: bool) -> Any:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl", reason="needs aigiqa-reward[trl]")
    tokenizer = word_tokenizer(WORDS)
    questions: list[Any] = [f"rewrite: {original}" for original in ORIGINALS]
    prompts = [[{"role": "user", "content": question}] for question in questions] if conversational else questions
    data = datasets.Dataset.from_dict({"prompt": prompts, "original": ORIGINALS, "note": [*range(4)]})
    quiet: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    few = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    config = trl.GRPOConfig(output_dir=str(folder), learning_rate=0.01, seed=0, **cpu, **quiet, **few)
    steps: list[dict[str, Any]] = []

    def witness(prompts: list[Any], **columns: Any) -> Any:
        steps.append({"prompts": prompts, **columns})
        return [0.0] * len(prompts)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, rewards = qwen_3(tokenizer, layers=1), [reward, witness]
        trainer = trl.GRPOTrainer(model, rewards, config, data, processing_class=tokenizer)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        trainer.train()
    moved = {name: float((weight.detach() - before[name]).abs().max()) for name, weight in model.named_parameters()}
    return SimpleNamespace(log=trainer.state.log_history, steps=steps, moved=moved)


@pytest.mark.parametrize("conversational", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["text", "chat"])
def test_rewards_reach_the_trainer_and_move_the_language_model(pipe: Any, tmp_path: Path, conversational: bool) -> None:
    judge = create_reward("compact")
    reward = RewriteReward(PromptScorer(pipe, judge, **SETTINGS))
    run = train(reward, tmp_path, conversational)
    logged = [line for line in run.log if "rewards/image_reward/mean" in line]
    assert len(logged) == len(run.steps) == 2
    for line, step in zip(logged, run.steps, strict=True):
        questions = [prompt[0]["content"] if conversational else prompt for prompt in step["prompts"]]
        assert questions == [f"rewrite: {original}" for original in step["original"]]
        assert [ORIGINALS[note] for note in step["note"]] == step["original"]
        texts = [one[0]["content"] if conversational else one for one in step["completions"]]
        assert line["rewrite/blank"] == pytest.approx(sum(not text.strip() for text in texts) / 4)
        expected = [
            by_hand(pipe, judge, text, original) if text.strip() else 0.0
            for text, original in zip(texts, step["original"], strict=True)
        ]
        assert line["rewards/image_reward/mean"] == pytest.approx(sum(expected) / 4, abs=5e-3)
    assert max(run.moved.values()) > 1e-3


def by_hand(pipe: Any, judge: Any, rewrite: str, original: str) -> float:
    generator = torch.Generator("cpu").manual_seed(0)
    image = pipe(rewrite.strip(), generator=generator, output_type="pt", **SETTINGS).images
    return float(judge(image, [original]).total)

"""Trainings with several steps per round, resumed in the middle of one, and validated trainings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import CALL, PROMPTS, warmth
from pandas import read_parquet
from safetensors.torch import load_file
from test_finetuning_loop import train
from torch import Tensor

from aigiqa_reward import create_reward
from aigiqa_reward.datasets.pairs import PAIRS_FILE as PAIRS
from aigiqa_reward.finetuning import DDPO, DPO, DRaFT, FinetuneResult
from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.lora import FILE
from aigiqa_reward.finetuning.pairs import read_preference_pairs
from aigiqa_reward.finetuning.validation import warn_of_weak
from aigiqa_reward.sampling import BestOfEachError

ROUNDS: dict[str, Algorithm] = {
    "ddpo": DDPO(images_per_prompt=2, updates_per_round=3, clip_range=0.1),
    "dpo": DPO(refresh_every=3, candidates=2, beta=10.0),
}
QUICK: dict[str, Any] = {"sampling": {**CALL, "num_inference_steps": 2}}


def plain(folder: Path, algorithm: Algorithm, **changes: Any) -> FinetuneResult:
    return train(folder, algorithm=algorithm, **{**QUICK, **changes})


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "nft")) for n in ROUNDS])
def test_a_training_goes_on_in_the_middle_of_a_round(name: str, tmp_path: Path) -> None:
    split = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain(tmp_path / "a", ROUNDS[name], max_train_steps=4, **split)
    plain(tmp_path / "b", ROUNDS[name], max_train_steps=2, **split)
    half = load_file(tmp_path / "b" / FILE)
    assert torch.load(tmp_path / "b" / "checkpoint-2" / "training_state.pt", weights_only=True)["memory"]
    found = plain(tmp_path / "b", ROUNDS[name], resume_from_checkpoint="latest", max_train_steps=4, **split)
    assert [line["step"] for line in found.history] == [1, 2, 3, 4]
    whole, again = (load_file(tmp_path / run / FILE) for run in "ab")
    assert not [key for key in whole if not torch.equal(whole[key], again[key])]
    assert [key for key in whole if not torch.equal(whole[key], half[key])]


@pytest.mark.parametrize(
    "contrast",
    [{"reward_guidance": 20.0}, pytest.param({"guidance_scales": (1.0, 4.0)}, marks=pytest.mark.slow)],
    ids=["reward", "scales"],
)
def test_without_pairs_they_are_made_first(tmp_path: Path, contrast: dict[str, Any]) -> None:
    own = DPO(candidates=2, pairs_per_prompt=2, timesteps="sampler", **contrast)

    def images(run: str) -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / run / "pairs").rglob("*.png")}

    plain(tmp_path / "a", own, max_train_steps=2, train_batch_size=2)
    given = read_preference_pairs(tmp_path / "a" / "pairs")
    plain(tmp_path / "b", DPO(timesteps="sampler"), prompts=given, max_train_steps=2, train_batch_size=2)
    plain(tmp_path / "c", own, max_train_steps=1, train_batch_size=2)
    made = images("c")
    assert len(made) == len(images("a")) == 2 * 2 * len(PROMPTS)
    assert not images("b")
    plain(tmp_path / "c", own, resume_from_checkpoint="latest", max_train_steps=2, train_batch_size=2)
    assert images("c") == made
    first, second, third = (load_file(tmp_path / run / FILE) for run in "abc")
    for other in (second, third):
        assert not [key for key in first if not torch.equal(first[key], other[key])]
    with pytest.raises(ValueError, match=r"seed: \d+ there, \d+ now"):
        plain(tmp_path / "c", own, resume_from_checkpoint="latest", max_train_steps=3, seed=1)
    with pytest.raises(ValueError, match=r"prompts: "):
        plain(
            tmp_path / "c", own, resume_from_checkpoint="latest", prompts=["new"], max_train_steps=3, train_batch_size=2
        )
    assert images("c") == made


def test_a_prompt_without_any_pair_is_left_out(tmp_path: Path) -> None:
    def fails(which: list[str]) -> Any:
        def judge(images: Tensor, prompts: list[str]) -> Tensor:
            return torch.where(
                torch.tensor([prompt in which for prompt in prompts]), torch.nan, warmth(images, prompts)
            )

        return judge

    own, settings = DPO(candidates=2), {"max_train_steps": 1, "train_batch_size": 2}
    with pytest.warns(UserWarning, match=rf"1 of {len(PROMPTS)} prompts failed: .* pairs of the others"):
        plain(tmp_path / "a", own, reward=fails(PROMPTS[:1]), **settings)
    assert set(read_preference_pairs(tmp_path / "a" / "pairs").prompts) == set(PROMPTS[1:])
    with pytest.raises(BestOfEachError):
        plain(tmp_path / "b", own, reward=fails(PROMPTS), **settings)


def test_pairs_within_the_margin_are_left_out(tmp_path: Path) -> None:
    plain(tmp_path / "a", DPO(candidates=2), max_train_steps=1)
    shutil.rmtree(tmp_path / "a" / "checkpoint-1")
    with pytest.raises(ValueError, match="n: 2 there, 3 now") as refused:
        plain(tmp_path / "a", DPO(candidates=3), resume_from_checkpoint="latest", max_train_steps=1)
    assert refused.value.__notes__ == [
        f"n and top_k are DPO's candidates; to make the pairs again, remove {tmp_path / 'a' / 'pairs'}"
    ]
    table = read_parquet(tmp_path / "a" / "pairs" / PAIRS)
    apart = sorted(table["winner_reward"] - table["loser_reward"])
    few = DPO(candidates=2, margin=(apart[-2] + apart[-1]) / 2)
    with pytest.warns(UserWarning, match=rf"pairs: 1 of {len(PROMPTS)} have rewards that differ by more than margin="):
        plain(tmp_path / "b", few, max_train_steps=1)


def test_the_trained_reward_is_not_held_out(tmp_path: Path) -> None:
    one, same = create_reward("compact"), create_reward("compact")
    for reward, holdout in ((warmth, warmth), (one, same)):
        with pytest.raises(ValueError, match=r"holdout: expected a reward that is not trained on, got the trained one"):
            plain(tmp_path, DRaFT(), reward=reward, validation_prompts=PROMPTS, holdout=holdout)
    with pytest.raises(TypeError, match="holdout: expected a Reward, its name or a function"):
        plain(tmp_path, DRaFT(), validation_prompts=PROMPTS, holdout=3)


def cold(images: Tensor, prompts: list[str]) -> Tensor:
    return -warmth(images, prompts)


def watched(folder: Path, holdout: Any, **changes: Any) -> FinetuneResult:
    prompts = [f"{thing} on a table" for thing in ("a cup", "a cat", "two keys", "a red hat", "an old lamp", "a pear")]
    settings = {"learning_rate": 0.05, "train_batch_size": 3, "validation_steps": 2, "validation_seeds": 2}
    settings |= {"max_train_steps": 8, "patience": 1, **changes}
    return plain(folder, DRaFT(), validation_prompts=prompts, holdout=holdout, **settings)


def test_a_hacked_reward_ends_the_training_and_the_weights_before_it_are_kept(tmp_path: Path) -> None:
    result = watched(tmp_path, cold)
    assert result.stopped is not None
    assert "held-out reward has fallen" in result.stopped
    assert result.steps < 8
    assert result.kept_step == 0
    kept = load_file(tmp_path / FILE)
    assert not any(bool(tensor.any()) for name, tensor in kept.items() if "lora_B" in name)
    assert {path.name for path in tmp_path.iterdir()} >= {"curves.png", "validation.png", "validation", FILE}


def test_the_best_validation_by_the_held_out_reward_is_kept(tmp_path: Path) -> None:
    result = watched(tmp_path, lambda images, prompts: warmth(images, prompts) / 2, max_train_steps=4)
    assert result.stopped is None
    means = {line["step"]: line["validation"]["holdout"] for line in result.history if "validation" in line}
    assert set(means) == {0, 2, 4}
    assert result.kept_step == max(means, key=lambda step: means[step]) > 0
    state = json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())
    assert state["monitor"]["best_step"] == result.kept_step
    kept = torch.load(tmp_path / "checkpoint-4" / "training_state.pt", weights_only=True)["kept"]
    top = load_file(tmp_path / FILE)
    assert kept.keys() == top.keys()
    assert not [name for name in top if not torch.equal(top[name], kept[name])]


def test_validation_prompts_that_show_little_give_a_warning() -> None:
    with pytest.warns(UserWarning, match="validation_prompts: one image gives no estimate of the noise"):
        warn_of_weak(["a cup"], PROMPTS, seeds=1)
    with pytest.warns(UserWarning, match=rf"1 of 2 are training prompts too \(first: '{PROMPTS[0]}'\)") as both:
        warn_of_weak(["a cup", PROMPTS[0]], PROMPTS, seeds=1)
    assert len(both) == 1


def test_a_round_is_not_gone_on_with_in_other_parts(tmp_path: Path) -> None:
    plain(tmp_path, ROUNDS["ddpo"], max_train_steps=1, train_batch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"train_batch_size: 2 there, 4 now"):
        plain(tmp_path, ROUNDS["ddpo"], resume_from_checkpoint="latest", max_train_steps=2, train_batch_size=4)

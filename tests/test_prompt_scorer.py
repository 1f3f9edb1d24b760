from typing import Any

import numpy as np
import pytest
import torch
from prompt_rewrites import APPLE, CROWN, PENGUIN, SETTINGS, Seen, Spoilt

from aigiqa_reward import BestOfN, load_embedded_pipeline
from aigiqa_reward.sampling import PromptScorer


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_embedded_pipeline()


def red_of(pipe: Any, prompt: str, seed: int, **settings: Any) -> float:
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipe(prompt, generator=generator, output_type="np", **(SETTINGS | settings)).images[0]
    return float(image[..., 0].mean())


def test_scores_are_those_of_the_pipelines_own_images(pipe: Any) -> None:
    settings = SETTINGS | {"guidance_scale": 3.0, "negative_prompt": "a ghost"}
    scorer = PromptScorer(pipe, Seen(), images_per_prompt=2, batch_size=3, **settings)
    scores = scorer.score([APPLE, PENGUIN], ["abc", "de"], seed=7)
    for score, prompt, length in zip(scores, [APPLE, PENGUIN], [3, 2], strict=True):
        red = np.mean([red_of(pipe, prompt, seed, **settings) for seed in (7, 8)])
        assert score.quality == pytest.approx(red, abs=2 / 255)
        assert score.correspondence == length
        assert score.total == pytest.approx(red + length, abs=2 / 255)
        assert (score.dropped, score.cached, score.flagged) == (None, False, False)


def test_how_they_are_batched_changes_nothing_and_global_noise_is_left_alone(pipe: Any) -> None:
    state = torch.random.get_rng_state()
    alone = PromptScorer(pipe, Seen(), batch_size=1, **SETTINGS).score([APPLE, PENGUIN, CROWN])
    together = PromptScorer(pipe, Seen(), batch_size=3, **SETTINGS).score([CROWN, APPLE, PENGUIN])
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(alone, [together[1], together[2], together[0]], strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-4)


def test_what_is_known_is_not_sampled_again(pipe: Any) -> None:
    reward = Seen()
    scorer = PromptScorer(pipe, reward, batch_size=4, **SETTINGS)
    first = scorer.score([APPLE, PENGUIN, APPLE], ["abc"] * 3)
    assert (len(reward.texts), [score.cached for score in first]) == (2, [False, False, True])
    again = scorer.score([PENGUIN, APPLE], ["abc"] * 2)
    assert (len(reward.texts), [score.cached for score in again]) == (2, [True, True])
    assert [again[1].total, again[0].total] == [score.total for score in first[:2]]
    scorer.score([APPLE], ["another text"])
    scorer.score([APPLE], ["abc"], seed=1)
    assert reward.texts[2:] == ["another text", "abc"], "another text or another seed is another score"
    scorer.clear()
    assert not scorer.score([APPLE], ["abc"])[0].cached


def test_memory_is_bounded_and_keeps_what_was_used_last(pipe: Any) -> None:
    reward = Seen()
    scorer = PromptScorer(pipe, reward, cache_size=2, **SETTINGS)
    scorer.score([APPLE, PENGUIN])
    scorer.score([APPLE])
    scorer.score([CROWN])
    assert scorer.score([APPLE])[0].cached
    assert not scorer.score([PENGUIN])[0].cached


def test_best_of_n_counts_the_best_candidate_by_the_original_text(pipe: Any) -> None:
    search = BestOfN(pipe, Seen(), n=3, reward_prompt="the user's own")
    scorer = PromptScorer(search, images_per_prompt=2, **SETTINGS)
    assert scorer.seeds_per_prompt == 6
    [score] = scorer.score([APPLE], ["abcd"], seed=10)
    reds = [red_of(pipe, APPLE, seed) for seed in range(10, 16)]
    assert score.quality == pytest.approx((max(reds[:3]) + max(reds[3:])) / 2, abs=2 / 255)
    assert score.correspondence == 4
    assert search.reward_prompt == "the user's own"
    with pytest.raises(ValueError, match="BestOfN judges by its own reward"):
        PromptScorer(search, Seen())


@pytest.mark.parametrize("best_of", [False, True])
def test_images_that_cannot_be_scored_are_reported_and_spoil_no_other(pipe: Any, best_of: bool) -> None:
    reward, spoilt = Seen(), Spoilt(pipe, nan=PENGUIN, flagged=CROWN)
    source: Any = BestOfN(spoilt, reward, n=1) if best_of else spoilt
    scorer = PromptScorer(source, None if best_of else reward, batch_size=3, **SETTINGS)
    nan, good, flagged = scorer.score([PENGUIN, APPLE, CROWN], ["x", "y", "z"])
    assert reward.texts == ["y"]
    assert good.quality == pytest.approx(red_of(pipe, APPLE, 0), abs=2 / 255)
    assert (nan.dropped, nan.flagged) == ("NaN or infinite pixels", False)
    assert flagged.flagged
    assert np.isnan([nan.total, flagged.total]).all()
    assert nan.quality is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"generator": None}, ValueError, "generator: PromptScorer sets this argument .* pass seed= to score"),
        ({"reward": None}, TypeError, "reward: expected a Reward, its name or a function"),
        ({"pipe": "sdxl"}, TypeError, "expected a diffusers pipeline or a BestOfN, got str"),
    ],
)
def test_arguments_are_checked(pipe: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PromptScorer(**({"pipe": pipe, "reward": Seen()} | arguments))


def test_prompts_are_checked_before_anything_is_sampled() -> None:
    scorer = PromptScorer(lambda prompt: pytest.fail("sampled"), Seen())
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected a text for the reward to see, got ' '"):
        scorer.score([APPLE, " "])
    with pytest.raises(ValueError, match="judged_by: expected one text per prompt, got 1 for 2"):
        scorer.score([APPLE, PENGUIN], ["a"])
    with pytest.raises(ValueError, match=r"judged_by\[1\]: 'a\\ud83d' has half of a character .* at position 1"):
        scorer.score([APPLE, APPLE], ["a", "a\ud83d"])
    with pytest.raises(TypeError, match="prompts: expected a list of texts, got str"):
        scorer.score(APPLE)

"""Watching a pipeline's steps: prompts, entering and leaving, errors."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks
from pipelines_current import pipeline
from torch import Tensor
from watched import PROMPT, STEPS, Recorder, is_left_alone, redness, sample

from aigiqa_reward.sampling.callbacks import RewardLogger
from aigiqa_reward.types import PromptFeatures


def test_prompts_of_a_batch_go_with_their_images():
    pipe, reward = pipeline("sd"), Recorder()
    prompts = ["a red apple", "a blue sea"]
    with RewardLogger(pipe, reward, prompts, every=9) as logger:
        images = sample(pipe, steps=2, prompt=prompts, num_images_per_prompt=2, callback_on_step_end=logger)
    assert reward.prompts[-1] == [prompts[0]] * 2 + [prompts[1]] * 2
    assert logger.history[-1].quality == pytest.approx(redness(images, [""] * 4).tolist(), abs=1e-3)
    with pytest.raises(ValueError, match="2 for 3 images"), RewardLogger(pipe, reward, prompts) as logger:
        sample(pipe, steps=1, num_images_per_prompt=3, callback_on_step_end=logger)


def test_the_prompt_is_encoded_once():
    class Featured(Recorder):
        device = torch.device("cpu")
        encoded: list[list[str]] = []  # noqa: RUF012

        def encode_prompts(self, prompts: list[str]) -> PromptFeatures:
            self.encoded.append(prompts)
            return PromptFeatures(texts=tuple(prompts), index=torch.arange(len(prompts)), tensors={}, model="x")

    pipe, reward = pipeline("sd"), Featured()
    with RewardLogger(pipe, reward, PROMPT) as logger:
        sample(pipe, steps=2, num_images_per_prompt=2, callback_on_step_end=logger)
    assert reward.encoded == [[PROMPT]]
    assert all(features.prompts == [PROMPT] * 2 for features in reward.prompts)


def test_previews_that_are_not_finite_are_nan_and_their_batch_mates_scored():
    pipe, reward = pipeline("sd"), Recorder()
    first = torch.tensor([0])
    hook = pipe.vae.decoder.register_forward_hook(lambda _, args, output: output.index_fill(0, first, torch.nan))
    try:
        with RewardLogger(pipe, reward, PROMPT) as logger:
            sample(pipe, steps=1, num_images_per_prompt=2, output_type="latent", callback_on_step_end=logger)
    finally:
        hook.remove()
    (entry,) = logger.history
    assert len(reward.images[0]) == 1
    for scores in (entry.total, entry.quality, entry.correspondence):
        assert torch.tensor(scores).isnan().tolist() == [True, False]


# --------------------------------------------------------------------------------------------- coming and going


def test_an_error_in_the_pipeline_leaves_nothing_behind():
    pipe = pipeline("sd")

    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), RewardLogger(pipe, broken, PROMPT) as logger:
        sample(pipe, callback_on_step_end=logger)
    assert is_left_alone(pipe)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_several_leave_in_any_order(order):
    pipe = pipeline("sd")
    watches = [RewardLogger(pipe, redness, PROMPT) for _ in range(3)]
    for watch in watches:
        watch.__enter__()
    sample(pipe, steps=2, callback_on_step_end=MultiPipelineCallbacks(watches))
    for place in order:
        watches[place].__exit__(None)
    assert is_left_alone(pipe)
    assert watches[0].history == watches[1].history == watches[2].history != []


def test_a_wrapper_of_the_users_own_stays():
    pipe, calls = pipeline("sdxl"), []
    original = pipe.scheduler.step

    @functools.wraps(original)
    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    pipe.scheduler.step = mine
    try:
        with RewardLogger(pipe, redness, PROMPT) as logger:
            copied = copy.deepcopy(pipe.scheduler)
            sample(pipe, callback_on_step_end=logger)
        assert len(calls) == len(logger.history) == STEPS
        assert pipe.scheduler.step is mine
        assert not hasattr(copied.step, "listeners")  # nobody listens to a copy
    finally:
        del pipe.scheduler.step


# --------------------------------------------------------------------------------------------- errors


def test_errors_say_what_to_do():
    pipe = pipeline("sd")
    logger = RewardLogger(pipe, redness, PROMPT)
    with pytest.raises(ValueError, match="within its with block"):
        sample(pipe, callback_on_step_end=logger)
    with pytest.raises(ValueError, match="entered already"), logger, logger:
        pass
    with pytest.raises(ValueError, match="make one for that pipeline"), logger:
        sample(pipeline("sdxl"), "sdxl", callback_on_step_end=logger)
    with pytest.warns(UserWarning, match="never called it"), logger:
        sample(pipe)
    with pytest.raises(ValueError, match="no callback_on_step_end"):
        RewardLogger(pipeline("pixart_sigma"), redness, PROMPT).__enter__()
    with pytest.raises(TypeError, match="RewardLogger"):
        RewardLogger(object(), redness, PROMPT)
    for prompt, error in ((" ", ValueError), ([], ValueError), (None, ValueError), (3, TypeError)):
        with pytest.raises(error, match="prompt"):
            RewardLogger(pipe, redness, prompt)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("sdxl", HeunDiscreteScheduler), ("sd3", DDIMScheduler), ("sd3", FlowMatchHeunDiscreteScheduler)],
)
def test_the_advice_about_other_schedulers_works(name, scheduler):
    pipe = copy.copy(pipeline(name))
    given, pipe.scheduler = pipe.scheduler, scheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"RewardLogger cannot serve {scheduler.__name__}") as caught:
        RewardLogger(pipe, redness, PROMPT).__enter__()
    if name == "sd3":
        assert "DDIMScheduler," not in str(caught.value)
        advice = str(caught.value).partition("Set ")[2]
        exec(advice, {"pipe": pipe, "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler})
        assert pipe.scheduler.config.shift == given.config.shift
        with RewardLogger(pipe, redness, PROMPT) as logger:
            followed = sample(pipe, callback_on_step_end=logger)
        assert torch.equal(followed, sample(pipeline("sd3")))

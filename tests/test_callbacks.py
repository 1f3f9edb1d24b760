import copy
import functools
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks
from pipelines import FAMILIES
from pipelines_current import pipeline
from torch import Tensor
from watched import PROMPT, STEPS, Recorder, families, is_left_alone, redness, sample

from aigiqa_reward.sampling.callbacks import EarlyExit, RewardLogger


@families("sd", "flux", "qwen_image", "sana", slow=("sdxl", "sd3", "flux_2", "flux_2_klein", "z_image"))
def test_the_last_entry_is_about_the_image_and_the_image_is_untouched(name):
    pipe, reward = pipeline(name), Recorder()
    alone = sample(pipe, name)
    with RewardLogger(pipe, reward, PROMPT) as logger:
        image = sample(pipe, name, callback_on_step_end=logger)
    assert torch.equal(image, alone)
    assert torch.allclose(reward.images[-1], image, atol=1e-3)
    assert is_left_alone(pipe)
    assert [entry.step for entry in logger.history] == list(range(STEPS))
    assert [entry.timestep for entry in logger.history] == pytest.approx(pipe.scheduler.timesteps.tolist())
    last = logger.history[-1]
    expected = redness(image, [PROMPT]).tolist()
    assert last.quality == pytest.approx(expected, abs=1e-3)
    assert last.total == pytest.approx([2 * e for e in expected], abs=2e-3)
    assert last.correspondence == pytest.approx([3 * e for e in expected], abs=3e-3)


@families("sdxl", "sd3", slow=("sd",))
def test_with_a_perfect_denoiser_every_preview_is_the_known_image(name):
    pipe, reward = pipeline(name), Recorder()
    shape = sample(pipe, name, steps=1, output_type="latent").shape
    known = torch.randn(shape, generator=torch.Generator().manual_seed(9))

    def perfect(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor]:
        latents, time = args[:2] if args else (kwargs["hidden_states"], kwargs["timestep"][0])
        if name == "sd3":  # x = (1 - s) x0 + s eps; the output is eps - x0, time is 1000 s
            return ((latents - known) / (time / 1000),)
        kept = pipe.scheduler.alphas_cumprod[int(time)]  # of Euler's scaled model input too
        return ((latents - kept.sqrt() * known) / (1 - kept).sqrt(),)

    denoiser = pipe.transformer if name == "sd3" else pipe.unet
    hook = denoiser.register_forward_hook(perfect, with_kwargs=True)
    try:
        with RewardLogger(pipe, reward, PROMPT) as logger:
            sample(pipe, name, guidance_scale=1.0, callback_on_step_end=logger)
    finally:
        hook.remove()
    config = pipe.vae.config
    with torch.no_grad():
        image = pipe.vae.decode(known / config.scaling_factor + (config.shift_factor or 0)).sample
    for preview in reward.images[:-1]:  # DDIM ends a little before the clean latents
        assert torch.allclose(preview, (image / 2 + 0.5).clamp(0, 1), atol=2e-3)
    assert len(reward.images) == STEPS


def test_every_third_step_and_the_last():
    pipe, reward = pipeline("sd"), Recorder()
    with RewardLogger(pipe, reward, PROMPT, every=3) as logger:
        for seed in range(2):
            sample(pipe, seed=seed, steps=5, callback_on_step_end=logger)
        assert [entry.step for entry in logger.history] == [0, 3, 4, 0, 3, 4]
    with logger:
        assert logger.history == []
        sample(pipe, steps=2, callback_on_step_end=logger)
    assert [entry.step for entry in logger.history] == [0, 1]


@pytest.mark.parametrize("end", [0.5, 0.7])
def test_the_last_step_before_a_refiner_is_scored_by_its_preview(end):
    pipe, every, third = pipeline("sdxl"), Recorder(), Recorder()
    for logger in (RewardLogger(pipe, every, PROMPT), RewardLogger(pipe, third, PROMPT, every=3)):
        with logger:
            sample(pipe, "sdxl", denoising_end=end, output_type="latent", callback_on_step_end=logger)
    last = pipe.num_timesteps - 1
    assert last < STEPS - 1
    assert [entry.step for entry in logger.history] == sorted({*range(0, last, 3), last})
    assert torch.equal(third.images[-1], every.images[-1])  # of the clean latents predicted there
    with RewardLogger(pipe, whole := Recorder(), PROMPT) as full:
        sample(pipe, "sdxl", callback_on_step_end=full)
    assert torch.equal(third.images[-1], whole.images[last])


@families("sd", "flux", slow=("z_image", "sana"))
def test_early_exit_saves_calls_and_the_preview_is_the_image(name):
    pipe, reward, calls = pipeline(name), Recorder(), []
    denoiser = pipe.unet if name == "sd" else pipe.transformer
    hook = denoiser.register_forward_hook(lambda *_: calls.append(1))
    try:
        whole = sample(pipe, name, steps=6)
        per_step = len(calls) // 6
        calls.clear()
        with (
            EarlyExit(pipe, reward, PROMPT, above=-9.0, first=0.5) as exit_,
            RewardLogger(pipe, redness, PROMPT) as logger,
        ):
            image = sample(pipe, name, steps=6, callback_on_step_end=MultiPipelineCallbacks([exit_, logger]))
    finally:
        hook.remove()
    assert exit_.exited_at == 2 and len(calls) == 3 * per_step  # half of six steps are always taken
    assert torch.allclose(reward.images[-1], image, atol=1e-4)
    assert not torch.allclose(whole, image, atol=1e-4)
    assert logger.history[-1].total == pytest.approx(exit_.history[-1].quality, abs=1e-4)  # of the image, too
    assert torch.equal(sample(pipe, name, steps=6), whole)


def test_early_exit_keeps_the_latents_type():
    pipe = FAMILIES["sd"]().to(torch.bfloat16)
    with EarlyExit(pipe, redness, PROMPT, above=-9.0) as exit_:
        assert sample(pipe, output_type="latent", callback_on_step_end=exit_).dtype == torch.bfloat16
    assert exit_.exited_at is not None


@pytest.mark.parametrize(
    ("scores", "above", "exited_at"), [([0.0, 1.0], 0.0, 0), ([0.0, 1.0], 0.5, None), ([1.0, torch.nan], 0.5, None)]
)
def test_all_images_must_be_good(scores, above, exited_at):
    pipe = pipeline("sd")
    with EarlyExit(pipe, lambda images, prompts: torch.tensor(scores), PROMPT, above=above, first=0.0) as exit_:
        sample(pipe, steps=2, num_images_per_prompt=2, callback_on_step_end=exit_)
    assert exit_.exited_at == exited_at


@pytest.mark.parametrize(
    ("scores", "patience", "exited_at"),
    [([1, 2, 3, 4, 5, 6], 1, None), ([1, 2, 2, 2, 2, 2], 2, 3), ([3, 1, 4, 1, 1, 9], 2, 4), ([2, 1, 1, 1, 1, 1], 1, 1)],
)
def test_patience_counts_steps_without_a_better_mean(scores, patience, exited_at):
    pipe = pipeline("sd")
    for seed in range(2):  # a second run of the same object starts afresh
        left = iter(scores)
        reward = functools.partial(lambda images, _, left: torch.tensor([float(next(left))]), left=left)
        with EarlyExit(pipe, reward, PROMPT, patience=patience, first=0.0) as exit_:
            sample(pipe, seed=seed, steps=6, callback_on_step_end=exit_)
        assert exit_.exited_at == exited_at


def test_early_exit_refuses():
    for arguments in ({}, {"above": float("nan")}, {"patience": 0}, {"first": 1.5, "above": 0.5}):
        with pytest.raises(ValueError, match=next(iter(arguments), "at least one")):
            EarlyExit(pipeline("sd"), redness, PROMPT, **arguments)


def test_prompts_of_a_batch_go_with_their_images():
    pipe, reward = pipeline("sd"), Recorder()
    prompts = ["a red apple", "a blue sea"]
    with RewardLogger(pipe, reward, prompts, every=9) as logger:
        images = sample(pipe, steps=2, prompt=prompts, num_images_per_prompt=2, callback_on_step_end=logger)
    assert reward.prompts[-1] == [prompts[0]] * 2 + [prompts[1]] * 2
    assert logger.history[-1].quality == pytest.approx(redness(images, [""] * 4).tolist(), abs=1e-3)
    with pytest.raises(ValueError, match="2 for 3 images"), RewardLogger(pipe, reward, prompts) as logger:
        sample(pipe, steps=1, num_images_per_prompt=3, callback_on_step_end=logger)


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
    ("name", "scheduler"), [("sdxl", "HeunDiscrete"), ("sd3", "DDIM"), ("sd3", "FlowMatchHeunDiscrete")]
)
def test_the_advice_about_other_schedulers_works(name, scheduler):
    pipe, cls = copy.copy(pipeline(name)), getattr(diffusers, f"{scheduler}Scheduler")
    given, pipe.scheduler = pipe.scheduler, cls.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"RewardLogger cannot serve {scheduler}Scheduler") as caught:
        RewardLogger(pipe, redness, PROMPT).__enter__()
    if name == "sd3":
        assert "DDIMScheduler," not in str(caught.value)
        flow_euler = diffusers.FlowMatchEulerDiscreteScheduler
        exec(str(caught.value).partition("Set ")[2], {"pipe": pipe, "FlowMatchEulerDiscreteScheduler": flow_euler})
        assert pipe.scheduler.config.shift == given.config.shift
        with RewardLogger(pipe, redness, PROMPT) as logger:
            followed = sample(pipe, callback_on_step_end=logger)
        assert torch.equal(followed, sample(pipeline("sd3")))

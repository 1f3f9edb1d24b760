"""Diffusion-DPO on real pipelines: where it starts, the paper's formula written a second time, where steps lead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
from algorithm_runs import batch_of, context_of, run_backward, take_gradient, write_pairs
from diffusers import DDPMScheduler
from pipelines import FEW_STEPS
from pipelines_current import CALL, CURRENT_FAMILIES
from torch import Tensor

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning import DPO
from aigiqa_reward.finetuning.algorithms.dpo import accuracy
from aigiqa_reward.finetuning.batch import Batch, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.noising import Noising
from aigiqa_reward.images import load

BETA = 500.0
ROWS = range(3)
STARTS = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * BETA**2)}


def velocity() -> Any:
    pipe = pipelines.stable_diffusion()
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    return pipe


BUILDERS: dict[str, Callable[[], Any]] = {**pipelines.FAMILIES, "sd v": velocity, **CURRENT_FAMILIES}
TRAINABLE = [kind for kind in BUILDERS if not kind.startswith("pixart")]  # whose transformer takes no LoRA in diffusers


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def family_context(kind: str, reward: Any = brightness, *, moved: float = 0.3, **more: Any) -> TrainingContext:
    return context_of(BUILDERS[kind](), reward, moved=moved, call=CALL.get(kind, FEW_STEPS), **more)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreferencePairs:
    return write_pairs(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def away() -> TrainingContext:
    return family_context("sd")


def outcome(dpo: DPO, context: TrainingContext, batch: Batch, part: int = 0, memory: Any = None) -> Outcome:
    (found,) = dpo.losses(context, batch, part, memory or {})
    return found


FEW = ("sd", "sd v", "sd3", "flux_2", "qwen_image")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FEW else pytest.mark.slow) for k in TRAINABLE])
def test_the_loss_starts_where_nothing_is_preferred(kind: str, pairs: PreferencePairs) -> None:
    context = family_context(kind, moved=0.0)
    weights = context.lora.weights
    for loss, start in STARTS.items() if kind == "sd" else [("sigmoid", math.log(2))]:
        ((found,),) = run_backward(DPO(pairs=pairs, beta=BETA, loss=loss), context, [batch_of(ROWS)])
        assert float(found.loss.detach()) == pytest.approx(start, rel=1e-6)
        assert found.measures["accuracy"].tolist() == [0.5] * 3
        assert found.measures["margin"].tolist() == found.measures["kl"].tolist() == [0.0] * 3
        assert sum(float(w.grad.abs().sum()) for n, w in weights.items() if "lora_B" in n and w.grad is not None) > 0
        assert bool(take_gradient(context).isfinite().all())
    assert accuracy(torch.tensor([2.0, -1.0, 0.0, 0.1])).tolist() == [1.0, 0.0, 0.5, 1.0]


def called_directly(context: TrainingContext, kind: str, noised: Tensor, time: Tensor, prompt: str) -> Tensor:
    pipe: Any = context.rollout.pipe
    if kind == "sdxl":
        texts, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
        return pipe.unet(noised, time, texts, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    if kind == "sd3":
        texts, _, pooled, _ = pipe.encode_prompt(prompt, None, None, device="cpu", do_classifier_free_guidance=False)
        return pipe.transformer(noised, texts, pooled, time[None]).sample
    texts, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    return pipe.unet(noised, time, texts).sample


def noised_by_diffusers(
    context: TrainingContext, clean: Tensor, noise: Tensor, level: int
) -> tuple[Tensor, Tensor, Tensor]:
    scheduler: Any = context.rollout.pipe.scheduler
    if "FlowMatch" in type(scheduler).__name__:
        fresh = type(scheduler).from_config(scheduler.config)
        time = fresh.timesteps.flip(0)[level]
        return fresh.scale_noise(clean, time[None], noise), time, noise - clean
    training, time = DDPMScheduler.from_config(scheduler.config), torch.tensor(level)
    noised = training.add_noise(clean, noise, time[None])
    kind = scheduler.config.prediction_type
    return noised, time, noise if kind == "epsilon" else training.get_velocity(clean, noise, time[None])


@torch.no_grad()
def insides_of(dpo: DPO, context: TrainingContext, kind: str, batch: Batch, pairs: PreferencePairs) -> Tensor:
    family = context.rollout.family
    like = torch.stack([family.encode_images(load(file)[None])[0] for file in pairs.better])
    levels, noise = dpo.draw(Noising.of(context.rollout.pipe.scheduler), batch, like)
    insides = []
    for row, place in enumerate(batch.places):
        gains = []
        for file in (pairs.better[place], pairs.worse[place]):
            clean = family.encode_images(load(file)[None])
            noised, time, target = noised_by_diffusers(context, clean, noise[row : row + 1], int(levels[row]))
            trained = called_directly(context, kind, noised, time, batch.prompts[row]).double()
            family.denoiser.disable_adapters()
            reference = called_directly(context, kind, noised, time, batch.prompts[row]).double()
            family.denoiser.enable_adapters()
            assert (trained - reference).abs().max() > 1e-4
            target = target.double()
            gains.append(((trained - target) ** 2).mean() - ((reference - target) ** 2).mean())
        insides.append(-dpo.beta / 2 * (gains[0] - gains[1]))
    return torch.stack(insides)


def test_levels_of_the_sampler_are_all_that_is_trained_on(pairs):
    context, times = family_context("flux"), []
    denoiser = context.rollout.family.denoiser

    def listen(module: Any, given: Any, named: Any) -> None:
        times.extend(named["timestep"].flatten().tolist())

    with denoiser.register_forward_pre_hook(listen, with_kwargs=True), torch.no_grad():
        context.rollout.run(context.start(batch_of([0])))
        visited, times[:] = set(times), []
        for step in range(12):
            outcome(DPO(pairs=pairs, timesteps="sampler"), context, batch_of(ROWS, round=step))
        assert set(times) == visited
        times.clear()
        outcome(DPO(pairs=pairs), context, batch_of(ROWS))
        assert set(times) - visited


@pytest.mark.parametrize(
    "kind", ["sd v", "sd3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd", "sdxl"))]
)
def test_the_loss_is_the_papers(kind, pairs):
    context, batch = family_context(kind), batch_of(ROWS)
    inside = insides_of(DPO(pairs=pairs, beta=BETA), context, kind, batch, pairs)
    assert inside.abs().max() > 1e-2  # it says something
    expected = {
        "sigmoid": -(1 / (1 + torch.exp(-inside))).log(),
        "hinge": torch.maximum(1 - inside, torch.zeros(())),
        "ipo": (inside / BETA - 0.5 / BETA) ** 2,
    }
    for loss, losses in expected.items():
        found = outcome(DPO(pairs=pairs, beta=BETA, loss=loss), context, batch)
        torch.testing.assert_close(found.measures["margin"].double(), inside, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found.loss.detach().double(), losses.mean(), atol=1e-6 / BETA, rtol=5e-3)
        assert (found.measures["kl"] > 0).all()


def test_noise_is_new_in_each_step_and_shared_by_winner_and_loser(pairs, away):
    dpo = DPO(pairs=pairs, beta=BETA)
    first, again, later = (outcome(dpo, away, batch_of(ROWS, round=step)).measures["margin"] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first != later).all()
    copies = [file.with_name(f"copy of {file.name}") for file in pairs.better]
    for file, copy in zip(pairs.better, copies, strict=True):
        copy.write_bytes(file.read_bytes())
    # One image twice: its errors are the same if noise and level are.
    same = PreferencePairs(prompts=pairs.prompts, better=pairs.better, worse=tuple(copies))
    margins = outcome(DPO(pairs=same, beta=BETA), away, batch_of(ROWS)).measures["margin"]
    assert margins.abs().max() < 1e-4 + 1e-4 * first.abs().max()


@pytest.mark.parametrize("loss", ["sigmoid", *(pytest.param(k, marks=pytest.mark.slow) for k in ("hinge", "ipo"))])
def test_steps_raise_the_implicit_accuracy(loss, pairs):
    context, dpo = family_context("sd", moved=0.0, rank=4), DPO(pairs=pairs, beta=BETA, loss=loss)
    optimizer = torch.optim.AdamW(context.lora.weights.values(), lr=3e-3)

    def judged() -> tuple[float, float]:
        with torch.no_grad():
            seen = [outcome(dpo, context, batch_of(ROWS, step=1000 + place, seed=5)).measures for place in range(20)]
        return tuple(float(torch.stack([m[name] for m in seen]).mean()) for name in ("accuracy", "margin"))  # type: ignore[return-value]

    for step in range(15):
        outcome(dpo, context, batch_of(ROWS, round=step, seed=5)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after, margin = judged()
    assert after > 0.65 and margin > 0


def test_fresh_pairs_are_the_brightest_and_the_darkest_candidates():
    context, batch = family_context("sd", moved=0.1), batch_of(ROWS, round=1, step=7)
    dpo = DPO(refresh_every=7, candidates=3)
    with torch.no_grad():
        memory = dpo.prepare(context, [batch])
        ends = [context.rollout.run(context.start(batch, f"candidate {place}")).latents for place in range(3)]
        found = torch.stack([brightness(context.rollout.show(latents), []) for latents in ends])
        bright, dark = (brightness(context.rollout.show(memory[f"{n}/0"]), []) for n in ("winners", "losers"))
    torch.testing.assert_close(bright, found.amax(dim=0))
    torch.testing.assert_close(dark, found.amin(dim=0))
    torch.testing.assert_close(memory["reward/0"], found.mean(dim=0))
    assert (bright > dark).all()
    result = outcome(dpo, context, batch, memory=memory)
    assert torch.equal(result.measures["reward"], memory["reward/0"])
    result.loss.backward()
    assert any(float(weight.grad.abs().sum()) > 0 for weight in context.lora.weights.values())


@pytest.mark.parametrize("broken", ["within the margin", "not finite"])
def test_rows_without_a_preference_teach_nothing(broken):
    def judging(images: Tensor, prompts: list[str]) -> Tensor:
        row = torch.arange(len(images)) == 1
        return torch.where(row, torch.nan, brightness(images, prompts)) if broken == "not finite" else 0 * row.float()

    context = family_context("sd", judging, moved=0.1)
    dpo = DPO(refresh_every=2, candidates=2, beta=BETA)
    with torch.no_grad():
        memory = dpo.prepare(context, [batch_of(ROWS)])
    same = (memory["winners/0"] == memory["losers/0"]).flatten(1).all(dim=1).tolist()
    assert same == ([True] * 3 if broken == "within the margin" else [False, True, False])
    if broken == "within the margin":
        result = outcome(dpo, context, batch_of(ROWS), memory=memory)
        assert float(result.loss.detach()) == pytest.approx(math.log(2), abs=1e-3)
        result.loss.backward()
        assert max(float(weight.grad.abs().max()) for weight in context.lora.weights.values()) < 1e-3


def test_given_pairs_come_first_and_fresh_ones_after(pairs, away):
    dpo = DPO(pairs=pairs, refresh_every=3, candidates=2)
    assert [dpo.round_of(step) for step in range(9)] == [0, 1, 2, 3, 3, 3, 4, 4, 4]  # each given pair once, then anew
    assert dpo.examples == pairs.prompts
    with torch.no_grad():
        assert all(dpo.prepare(away, [batch_of(round=step)]) == {} for step in range(3))
        fresh = dpo.prepare(away, [batch_of(round=3)])
    assert fresh.keys() == {"winners/0", "losers/0", "reward/0"}
    assert DPO(pairs=pairs).prepare(away, [batch_of(round=4)]) == {}
    assert (dpo.steps_per_round, DPO(pairs=pairs).steps_per_round, DPO(refresh_every=3).examples) == (3, 1, None)


def test_settings_without_effect_and_impossible_pairings_are_refused(pairs: PreferencePairs) -> None:
    for match, settings in {
        r"pairs_per_prompt: expected at most candidates / 2 = 2, got 3; raise candidates": {"pairs_per_prompt": 3},
        r"pairs_per_prompt: expected at most candidates = 4, got 5": {"pairs_per_prompt": 5, "guidance_scales": (1, 2)},
        r"guidance_scales: .* two different scales or none, got \[3.0, 3.0\]": {"guidance_scales": (3, 3)},
        r"guidance_scales: applies to pairs that": {"refresh_every": 2, "guidance_scales": (1, 2)},
        r"margin: applies to pairs that": {"pairs": pairs, "margin": 0.5},
        r"reward_guidance: expected a number of at least 0, .* got inf": {"reward_guidance": float("inf")},
    }.items():
        with pytest.raises(ValueError, match=match):
            DPO(**settings)

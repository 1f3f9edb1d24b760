"""Diffusion-DPO on real pipelines: where it starts, the paper's formula written a second time, where a step leads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pipelines
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image
from pipelines import FEW_STEPS
from pipelines_current import CALL, CURRENT_FAMILIES
from torch import Tensor

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning.algorithms.dpo import DPO, Noising, accuracy
from aigiqa_reward.finetuning.batch import Batch, Outcome
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.images import load
from aigiqa_reward.sampling.rollout import Rollout

PROMPTS = ("a cat on a mat", "a red apple", "a cat on a mat")
BETA = 500.0
STARTS = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * BETA**2)}


def velocity() -> Any:
    pipe = pipelines.stable_diffusion()
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    return pipe


BUILDERS: dict[str, Callable[[], Any]] = {**pipelines.FAMILIES, "sd v": velocity, **CURRENT_FAMILIES}
TRAINABLE = [kind for kind in BUILDERS if not kind.startswith("pixart")]  # whose transformer takes no LoRA in diffusers


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def tools_of(kind: str, reward: Any = brightness, *, away: float = 0.0, **more: Any) -> TrainingContext:
    """TrainingContext of a fresh pipeline; with `away`, the LoRA's B is drawn from a normal of that deviation."""
    rollout = Rollout(BUILDERS[kind](), **CALL.get(kind, FEW_STEPS))
    lora = LoRA(rollout.family, rank=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in lora.weights.items():
            if away and "lora_B" in name:
                weight.copy_(away * torch.randn(weight.shape, generator=generator))
    return TrainingContext(rollout=rollout, lora=lora, reward=reward, accelerator=Accelerator(cpu=True), **more)


def batch_of(rows: int = 3, **more: Any) -> Batch:
    taken = {"places": tuple(range(rows)), "rows": tuple(range(rows)), "round": 0, "step": 0, "size": rows, "seed": 5}
    return Batch(prompts=PROMPTS[:rows], **{**taken, **more})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreferencePairs:
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in ("better", "worse"):
        for place in range(len(PROMPTS)):
            image = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(image.numpy()).resize((32, 32)).save(folder / f"{name} {place}.png")
    return PreferencePairs(
        prompts=PROMPTS,
        better=tuple(folder / f"better {place}.png" for place in range(3)),
        worse=tuple(folder / f"worse {place}.png" for place in range(3)),
    )


def outcome(dpo: DPO, tools: TrainingContext, batch: Batch, part: int = 0, memory: Any = None) -> Outcome:
    (found,) = dpo.losses(tools, batch, part, memory or {})
    return found


# --------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("kind", TRAINABLE)
def test_the_loss_starts_where_nothing_is_preferred(kind, pairs):
    tools = tools_of(kind)
    weights = tools.lora.weights
    for loss, start in STARTS.items():
        found = outcome(DPO(pairs=pairs, beta=BETA, loss=loss), tools, batch_of())
        assert float(found.loss.detach()) == pytest.approx(start, rel=1e-6)
        assert found.measures["accuracy"].tolist() == [0.5] * 3
        assert found.measures["margin"].tolist() == [0.0] * 3
        assert found.measures["kl"].tolist() == [0.0] * 3
        found.loss.backward()
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
        assert sum(float(gradient.abs().sum()) for name, gradient in gradients.items() if "lora_B" in name) > 0
        for weight in weights.values():
            weight.grad = None
    frozen = [weight for name, weight in tools.rollout.family.denoiser.named_parameters() if name not in weights]
    assert all(weight.grad is None for weight in frozen)


def test_in_mixed_precision_the_start_is_the_same_and_gradients_arrive(pairs):
    """Autocast keeps weights that it has cast; those of the reference, which have no graph, must not serve the loss."""
    tools = tools_of("sd")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(DPO(pairs=pairs, beta=BETA), tools, batch_of())
    assert found.loss.dtype == torch.float32
    assert float(found.loss.detach()) == pytest.approx(math.log(2), rel=1e-6)
    found.loss.backward()
    gradients = [weight.grad for name, weight in tools.lora.weights.items() if "lora_B" in name]
    assert all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_ties_count_half():
    assert accuracy(torch.tensor([2.0, -1.0, 0.0, 0.1])).tolist() == [1.0, 0.0, 0.5, 1.0]


# --------------------------------------------------------------------------------------------- the formula again


def called_directly(tools: TrainingContext, kind: str, noised: Tensor, time: Tensor, prompt: str) -> Tensor:
    """The denoiser's output for one row, with the pipeline's own parts alone."""
    pipe: Any = tools.rollout.pipe
    if kind == "sdxl":
        texts, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
        return pipe.unet(noised, time, texts, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    if kind == "sd3":
        texts, _, pooled, _ = pipe.encode_prompt(prompt, None, None, device="cpu", do_classifier_free_guidance=False)
        return pipe.transformer(noised, texts, pooled, time[None]).sample
    if kind == "flux":
        texts, pooled, places = pipe.encode_prompt(prompt, None, device="cpu")
        grid = pipe._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)
        told = torch.tensor([3.5])  # the pipeline's default
        return pipe.transformer(
            noised, texts, pooled, time[None] / 1000, img_ids=grid, txt_ids=places, guidance=told
        ).sample
    texts, _ = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    return pipe.unet(noised, time, texts).sample


def noised_by_diffusers(
    tools: TrainingContext, clean: Tensor, noise: Tensor, level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, the time of their level, and the target."""
    scheduler: Any = tools.rollout.pipe.scheduler
    if "FlowMatch" in type(scheduler).__name__:
        fresh = type(scheduler).from_config(scheduler.config)
        time = fresh.timesteps.flip(0)[level]
        return fresh.scale_noise(clean, time[None], noise), time, noise - clean
    training, time = DDPMScheduler.from_config(scheduler.config), torch.tensor(level)
    noised = training.add_noise(clean, noise, time[None])
    kind = scheduler.config.prediction_type
    return noised, time, noise if kind == "epsilon" else training.get_velocity(clean, noise, time[None])


@torch.no_grad()
def insides_of(dpo: DPO, tools: TrainingContext, kind: str, batch: Batch, pairs: PreferencePairs) -> Tensor:
    """Insides (B,) in float64 by equation 14, one image at a time."""
    family = tools.rollout.family
    like = torch.stack([family.encode_images(load(file)[None])[0] for file in pairs.better])
    levels, noise = dpo.draw(Noising.of(tools.rollout.pipe.scheduler), batch, like)
    insides = []
    for row, place in enumerate(batch.places):
        gains = []
        for file in (pairs.better[place], pairs.worse[place]):
            clean = family.encode_images(load(file)[None])
            noised, time, target = noised_by_diffusers(tools, clean, noise[row : row + 1], int(levels[row]))
            trained = called_directly(tools, kind, noised, time, batch.prompts[row]).double()
            family.denoiser.disable_adapters()
            reference = called_directly(tools, kind, noised, time, batch.prompts[row]).double()
            family.denoiser.enable_adapters()
            assert (trained - reference).abs().max() > 1e-4
            target = target.double()
            gains.append(((trained - target) ** 2).mean() - ((reference - target) ** 2).mean())
        insides.append(-dpo.beta / 2 * (gains[0] - gains[1]))
    return torch.stack(insides)


@pytest.mark.parametrize("kind", ["sd v", "flux"])
def test_levels_of_the_sampler_are_all_that_is_trained_on(kind, pairs):
    """The times that the denoiser is told are those at which the pipeline's own sampling tells it."""
    tools, told = tools_of(kind), []
    denoiser, name = tools.rollout.family.denoiser, "timestep"

    def listen(module: Any, given: Any, named: Any) -> None:
        told.extend((named[name] if name in named else given[1]).flatten().tolist())

    with denoiser.register_forward_pre_hook(listen, with_kwargs=True), torch.no_grad():
        tools.rollout.run(tools.start(batch_of(1)))
        visited, told[:] = set(told), []
        for step in range(12):
            outcome(DPO(pairs=pairs, timesteps="sampler"), tools, batch_of(step=step))
        assert set(told) == visited
        told.clear()
        outcome(DPO(pairs=pairs), tools, batch_of())
        assert set(told) - visited


@pytest.mark.parametrize("kind", ["sd", "sd v", "sdxl", "sd3", "flux"])
def test_the_loss_is_the_papers(kind, pairs):
    tools, batch = tools_of(kind, away=0.3), batch_of()
    inside = insides_of(DPO(pairs=pairs, beta=BETA), tools, kind, batch, pairs)
    assert inside.abs().max() > 1e-2  # it says something
    expected = {
        "sigmoid": -(1 / (1 + torch.exp(-inside))).log(),
        "hinge": torch.maximum(1 - inside, torch.zeros(())),
        "ipo": (inside / BETA - 0.5 / BETA) ** 2,
    }
    for loss, losses in expected.items():
        found = outcome(DPO(pairs=pairs, beta=BETA, loss=loss), tools, batch)
        torch.testing.assert_close(found.measures["margin"].double(), inside, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found.loss.detach().double(), losses.mean(), atol=1e-6 / BETA, rtol=5e-3)
        assert (found.measures["kl"] > 0).all()


def test_the_inside_that_ipo_wants_is_a_half():
    dpo = DPO(refresh_every=1, beta=BETA, loss="ipo")
    inside = torch.tensor([-1.0, 0.4, 0.5, 0.6], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dpo.pair_loss(inside).sum(), inside)
    assert gradient.sign().tolist() == [-1, -1, 0, 1]
    torch.testing.assert_close(gradient, 2 * (inside.detach() - 0.5) / BETA**2)


def test_the_distance_to_the_reference_can_be_paid_for(pairs):
    batch, dpo = batch_of(), DPO(pairs=pairs, beta=BETA)
    free, paid = (outcome(dpo, tools_of("sd", away=0.3, penalty=p), batch) for p in (0.0, 10.0))
    expected = free.loss + 10.0 * free.measures["kl"].mean()
    torch.testing.assert_close(paid.loss, expected)


# --------------------------------------------------------------------------------------------- rows


def test_a_rows_loss_does_not_depend_on_its_part_of_the_batch(pairs):
    tools, dpo = tools_of("sd3", away=0.3), DPO(pairs=pairs, beta=BETA)
    whole = outcome(dpo, tools, batch_of()).measures["margin"]
    for row in range(3):
        alone = replace(batch_of(1), prompts=(PROMPTS[row],), places=(row,), rows=(row,))
        # beta / 2 times what differs in single precision between errors of about 1
        margin = outcome(dpo, tools, alone).measures["margin"]
        torch.testing.assert_close(margin, whole[row : row + 1], atol=BETA * 1e-6, rtol=0)
    assert whole.abs().min() > 20 * BETA * 1e-6


def test_noise_is_new_in_each_step_and_shared_by_winner_and_loser(pairs):
    tools = tools_of("sd", away=0.3)
    dpo = DPO(pairs=pairs, beta=BETA)
    first, again, later = (outcome(dpo, tools, batch_of(step=step)).measures["margin"] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first != later).all()
    copies = [file.with_name(f"copy of {file.name}") for file in pairs.better]
    for file, copy in zip(pairs.better, copies, strict=True):
        copy.write_bytes(file.read_bytes())
    # One image twice: its errors are the same if noise and level are.
    same = PreferencePairs(prompts=PROMPTS, better=pairs.better, worse=tuple(copies))
    margins = outcome(DPO(pairs=same, beta=BETA), tools, batch_of()).measures["margin"]
    assert margins.abs().max() < 1e-4 + 1e-4 * first.abs().max()


def test_checkpointing_changes_nothing(pairs):
    found = []
    for checkpointed in (False, True):
        tools = tools_of("flux", away=0.3, checkpointed=checkpointed)
        outcome(DPO(pairs=pairs, beta=BETA), tools, batch_of()).loss.backward()
        found.append({name: weight.grad for name, weight in tools.lora.weights.items()})
    plain, again = found
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


# --------------------------------------------------------------------------------------------- where it leads


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("sd", "sigmoid"),
        pytest.param("sd", "hinge", marks=pytest.mark.slow),
        pytest.param("sd", "ipo", marks=pytest.mark.slow),
        pytest.param("sd3", "sigmoid", marks=pytest.mark.slow),
    ],
)
def test_steps_raise_the_implicit_accuracy(kind, loss, pairs):
    """Seen on noise that no step was taken on: 60 draws, of which at random 40 or more would be right once in 150."""
    tools, dpo = tools_of(kind), DPO(pairs=pairs, beta=BETA, loss=loss)
    optimizer = torch.optim.AdamW(tools.lora.weights.values(), lr=3e-3)

    def judged() -> tuple[float, float]:
        with torch.no_grad():
            seen = [outcome(dpo, tools, batch_of(step=1000 + place)).measures for place in range(20)]
        return tuple(float(torch.stack([m[name] for m in seen]).mean()) for name in ("accuracy", "margin"))  # type: ignore[return-value]

    assert judged() == (0.5, 0.0)
    for step in range(15):
        outcome(dpo, tools, batch_of(step=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after, margin = judged()
    assert after > 0.65
    assert margin > 0


# --------------------------------------------------------------------------------------------- pairs made on the way


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_fresh_pairs_are_the_brightest_and_the_darkest_candidates(kind):
    tools, batch = tools_of(kind, away=0.1), batch_of(round=1, step=7)
    dpo = DPO(refresh_every=7, candidates=3)
    with torch.no_grad():
        memory = dpo.prepare(tools, [batch])
        ends = [tools.rollout.run(tools.start(batch, f"candidate {place}")).latents for place in range(3)]
        found = torch.stack([brightness(tools.rollout.show(latents), []) for latents in ends])
        bright, dark = (brightness(tools.rollout.show(memory[f"{n}/0"]), []) for n in ("winners", "losers"))
    torch.testing.assert_close(bright, found.amax(dim=0))
    torch.testing.assert_close(dark, found.amin(dim=0))
    torch.testing.assert_close(memory["reward/0"], found.mean(dim=0))
    assert (bright > dark).all()
    result = outcome(dpo, tools, batch, memory=memory)
    assert torch.equal(result.measures["reward"], memory["reward/0"])
    result.loss.backward()
    assert any(float(weight.grad.abs().sum()) > 0 for weight in tools.lora.weights.values())


def test_fresh_pairs_come_from_the_adapter_as_it_is():
    batch, dpo = batch_of(), DPO(refresh_every=2, candidates=2)
    with torch.no_grad():
        none, some = (dpo.prepare(tools_of("sd", away=away), [batch])["winners/0"] for away in (0.0, 0.3))
    assert (none - some).abs().max() > 1e-2


def test_parts_have_their_own_pairs():
    tools, dpo = tools_of("sd", away=0.1), DPO(refresh_every=2, candidates=2)
    parts = [batch_of(1), replace(batch_of(1), prompts=(PROMPTS[1],), rows=(1,), places=(1,))]
    with torch.no_grad():
        memory = dpo.prepare(tools, parts)
        alone = dpo.prepare(tools, parts[1:])
    torch.testing.assert_close(memory["winners/1"], alone["winners/0"])
    assert outcome(dpo, tools, parts[1], 1, memory).measures["margin"].shape == (1,)


@pytest.mark.parametrize("broken", ["within the margin", "not finite"])
def test_rows_without_a_preference_teach_nothing(broken):
    def judging(images: Tensor, prompts: list[str]) -> Tensor:
        row = torch.arange(len(images)) == 1
        return torch.where(row, torch.nan, brightness(images, prompts)) if broken == "not finite" else 0 * row.float()

    tools = tools_of("sd", judging, away=0.1)
    dpo = DPO(refresh_every=2, candidates=2, beta=BETA)
    with torch.no_grad():
        memory = dpo.prepare(tools, [batch_of()])
    same = (memory["winners/0"] == memory["losers/0"]).flatten(1).all(dim=1).tolist()
    assert same == ([True] * 3 if broken == "within the margin" else [False, True, False])
    if broken == "within the margin":
        result = outcome(dpo, tools, batch_of(), memory=memory)
        assert float(result.loss.detach()) == pytest.approx(math.log(2), abs=1e-3)
        result.loss.backward()
        assert max(float(weight.grad.abs().max()) for weight in tools.lora.weights.values()) < 1e-3


def test_given_pairs_come_first_and_fresh_ones_after(pairs):
    tools, dpo = tools_of("sd"), DPO(pairs=pairs, refresh_every=3, candidates=2)
    assert dpo.steps_per_round == 3
    assert [dpo.round_of(step) for step in range(9)] == [0, 1, 2, 3, 3, 3, 4, 4, 4]  # each given pair once, then anew
    assert dpo.examples == PROMPTS
    with torch.no_grad():
        assert all(dpo.prepare(tools, [replace(batch_of(round=step), step=step)]) == {} for step in range(3))
        fresh = dpo.prepare(tools, [replace(batch_of(round=3), step=3)])
        assert {name.partition("/")[0] for name in fresh} == {
            "winners",
            "losers",
            "reward",
        }
    assert DPO(pairs=pairs).prepare(tools, [batch_of(round=4)]) == {}
    assert DPO(pairs=pairs).steps_per_round == 1
    assert DPO(refresh_every=3).examples is None


# --------------------------------------------------------------------------------------------- refusals


def test_settings_out_of_range_are_refused(pairs):
    none = PreferencePairs(prompts=(), better=(), worse=())
    for match, settings in {
        r"timesteps: expected one of uniform, sampler, got 'late'": {"timesteps": "late"},
        r"pairs_per_prompt: expected at most candidates / 2 = 2, got 3; raise candidates": {"pairs_per_prompt": 3},
        r"pairs_per_prompt: expected at most candidates = 4, got 5": {"pairs_per_prompt": 5, "guidance_scales": (1, 2)},
        r"guidance_scales: expected none, or at least two different scales, got \[3\]": {"guidance_scales": (3,)},
        r"guidance_scales: .* two different scales, got \[3, 3\]": {"guidance_scales": (3, 3)},
        r"pairs_per_prompt: of pairs that are made before": {"pairs": pairs, "pairs_per_prompt": 2},
        r"guidance_scales: of pairs that are made before": {"refresh_every": 2, "guidance_scales": (1, 2)},
        r"reward_guidance: of pairs that are made before": {"pairs": pairs, "reward_guidance": 1.0},
        r"margin: of pairs that are made before": {"pairs": pairs, "margin": 0.5},
        r"reward_guidance: expected a number of at least 0, .* got inf": {"reward_guidance": float("inf")},
        r"pairs: expected at least one, got none": {"pairs": none},
        r"beta: expected a number above 0; .* got 0": {"pairs": pairs, "beta": 0},
        r"loss: expected one of sigmoid, hinge, ipo, got 'kto'": {"pairs": pairs, "loss": "kto"},
        r"refresh_every: expected an integer of at least 0, got -1": {"pairs": pairs, "refresh_every": -1},
        r"candidates: expected an integer of at least 2, got 1": {"pairs": pairs, "candidates": 1},
        r"margin: expected a number of at least 0, .*, got -0.1": {"pairs": pairs, "margin": -0.1},
    }.items():
        with pytest.raises(ValueError, match=match):
            DPO(**settings)
    with pytest.raises(TypeError, match=r"pairs: expected PreferencePairs, got 'made'; pass read_preference_pairs"):
        DPO(pairs="made")
    with pytest.raises(TypeError, match=r"guidance_scales: expected several numbers, as .*, got 3.0"):
        DPO(guidance_scales=3.0)


def test_a_scheduler_that_does_not_tell_its_training_is_refused(pairs):
    tools = tools_of("sd")
    DPO(pairs=pairs).check(tools, PROMPTS)
    tools.rollout.pipe.scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="prediction_type='score'"):
        DPO(pairs=pairs).check(tools, PROMPTS)

import gc
import math
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from pipelines import FAMILIES, SIDE
from pipelines_current import CALL as CURRENT_CALL
from pipelines_current import CURRENT_FAMILIES, GUIDED, pipeline
from torch import Tensor

from aigiqa_reward import BestOfN, load_embedded_pipeline
from aigiqa_reward.sampling import Halving, NoiseOptimizer, ParticleSteering, ZeroOrder
from aigiqa_reward.sampling.rollout import Rollout

PROMPT = "a cat on a mat"
CALL = {"height": SIDE, "width": SIDE, "num_inference_steps": 6}
HALVE = Halving(at=(0.34, 0.67), keep=0.5)


def corner(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(prompts) == len(images)
    return images[:, 0, :4, :4].mean(dim=(1, 2))


def make(pipe: Any, n: int = 8, **arguments: Any) -> BestOfN:
    return BestOfN(pipe, arguments.pop("reward", corner), n=n, progress=False, **arguments)


def count_rows(module: torch.nn.Module) -> list[int]:
    rows: list[int] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    return rows


def pixels_of(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def sd() -> Any:
    return pipelines.stable_diffusion()


FAST = ("sd", "flux", "z_image", "qwen_image", "pixart_sigma")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in (*FAMILIES, *CURRENT_FAMILIES)]
)
def test_winners_of_every_search_are_the_images_of_their_seeds(family):
    pipe, call = pipeline(family), {**CURRENT_CALL.get(family, CALL), **GUIDED.get(family, {})}
    for arguments in ({}, {"pruning": Halving(at=(0.5,), keep=0.5)}, {"search": "zero_order"}):
        found = make(pipe, n=3, **arguments)(PROMPT, seed=5, **call)
        own = {} if found.noises is None else {"latents": found.noises[0]}
        generator = torch.Generator().manual_seed(found.seeds[0])
        made = pipe(prompt=PROMPT, generator=generator, **own, **call).images[0]
        assert np.abs(pixels_of(found.images[0]) - pixels_of(made)).max() <= 2
        assert found.scores[0] == pytest.approx(pixels_of(made)[:4, :4, 0].mean() / 255, abs=0.01)


def test_previews_are_the_decoded_clean_latents_and_decide_what_is_kept(sd):
    call = {**CALL, "guidance_scale": 1.0}
    rows = count_rows(sd.unet)
    found = make(sd, pruning=HALVE, batch_size=3)(PROMPT, seed=5, **call)
    rows = list(rows)
    rollout = Rollout(sd, **call)
    seeds = range(5, 13)
    with torch.no_grad():
        state = rollout.start(rollout.encode([PROMPT] * 8), [torch.Generator().manual_seed(s) for s in seeds])
        totals = {}
        while state.step < 4:
            prediction = rollout.predict(state)
            state = rollout.advance(state, prediction.output)
            shown = rollout.decode(prediction.clean).clamp(0, 1)
            totals[state.step] = dict(zip(seeds, corner(shown, [PROMPT] * 8).tolist(), strict=True))
    first = sorted(seeds, key=lambda seed: -totals[2][seed])[:4]
    second = sorted(first, key=lambda seed: -totals[4][seed])[:2]
    assert {seed for seed in seeds if len(found.previews[seed]) == 2} == set(first)
    for seed, previews in found.previews.items():
        assert [(p.step, p.steps) for p in previews] == ([(2, 6), (4, 6)] if seed in first else [(2, 6)])
        assert [p.total for p in previews] == pytest.approx([totals[p.step][seed] for p in previews], abs=1e-4)
    scored = [seed for seed, s in zip(found.all_seeds, found.all_scores, strict=True) if not math.isnan(s)]
    assert scored == sorted(second)
    assert not found.dropped
    assert found.denoiser_calls == sum(rows) == HALVE.calls(8, 6)


def test_candidates_with_bad_previews_are_dropped_and_the_others_continue(sd):
    def blind(images: Tensor, prompts: list[str]) -> Tensor:
        scores = corner(images, prompts)
        return torch.where(scores == scores.max(), torch.inf, scores)  # one of each chunk of 4, 4, and then 3

    def held() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is Tensor and not o.is_nested]  # those have no shape
        return sum(tensor.shape == (1, 4, SIDE // 2, SIDE // 2) for tensor in tensors)

    before = held()
    stream = make(sd, reward=blind, pruning=Halving(at=(0.5,), keep=0.5), batch_size=4).stream(PROMPT, **CALL)
    outputs = [next(stream) for _ in range(3)]
    assert held() == before + 2  # of the two that were pruned, which may have to continue
    with pytest.warns(UserWarning, match=r"3 of 8 candidates were dropped \(seed \d+, \d+, \d+: the reward gave inf\)"):
        outputs += stream
    assert len(outputs) == 3
    assert len(outputs[-1].dropped) == 3


def test_pruned_candidates_take_the_place_of_those_that_are_flagged_at_the_end(monkeypatch):
    pipe = pipelines.stable_diffusion(safety_checker=True)
    call = {**CALL, "num_inference_steps": 3, "guidance_scale": 1.0}
    first = make(pipe, pruning=HALVE)(PROMPT, **call)
    flagged = [seed for seed, score in zip(first.all_seeds, first.all_scores, strict=True) if not math.isnan(score)]
    unflagged = [seed for seed in first.all_seeds if seed not in flagged]
    plain = make(pipe, top_k=8, batch_size=8)(PROMPT, **call)
    images = dict(zip(plain.seeds, plain.images, strict=True))

    def check(decoded: Tensor, *_: Any) -> tuple[Tensor, list[bool]]:
        shown = (decoded / 2 + 0.5).clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()
        return decoded, [any(np.abs(one - images[seed]).max() < 3 for seed in flagged) for one in shown]

    monkeypatch.setattr(pipe, "run_safety_checker", check)
    with pytest.warns(UserWarning, match=rf"{len(flagged)} of 8 candidates were dropped \("):
        one = make(pipe, pruning=HALVE)(PROMPT, **call)
    last = max(len(one.previews[seed]) for seed in unflagged)  # those that left last come first
    left = [seed for seed in unflagged if len(one.previews[seed]) == last]
    assert one.seeds == [max(left, key=lambda seed: one.previews[seed][-1].total)]
    assert one.denoiser_calls == HALVE.calls(8, 3) + 3 - one.previews[one.seeds[0]][-1].step
    with pytest.warns(UserWarning, match="candidates were dropped"):
        many = make(pipe, top_k=5, pruning=HALVE)(PROMPT, **call)
    assert len(many.seeds) == 5
    assert set(many.dropped) <= set(flagged)
    for found in (one, many):
        for seed, image in zip(found.seeds, found.images, strict=True):
            assert np.abs(pixels_of(image) - images[seed]).max() <= 2


@pytest.mark.parametrize("part", ["denoiser", pytest.param("decoder", marks=pytest.mark.slow), "reward"])
def test_a_chunk_out_of_memory_is_halved_and_seeds_hold(part):
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    call = {**CALL, "guidance_scale": 1.0}
    steps: list[int] = []
    refused: list[int] = []

    def refuse(_: Any, args: tuple[Tensor, ...]) -> None:
        steps.append(len(args[0]))
        if len(args[0]) > 1 and (part != "denoiser" or len(steps) % 2 == 0):  # in the middle of a chunk
            refused.append(len(args[0]))
            raise torch.OutOfMemoryError("too much")

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        if part == "reward":
            refuse(None, (images,))
        return corner(images, prompts)

    module = {"denoiser": pipe.unet, "decoder": pipe.vae.decoder}.get(part)
    hook = module.register_forward_pre_hook(refuse) if module else None
    found = make(pipe, n=6, top_k=2, reward=reward, pruning=HALVE, batch_size=3)(PROMPT, **call)
    if hook:
        hook.remove()
    assert len(refused) >= 2
    assert found.denoiser_calls == HALVE.calls(6, 6, least=2)
    for seed, image in zip(found.seeds, found.images, strict=True):
        made = pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **call).images[0]
        assert np.abs(pixels_of(image) - pixels_of(made)).max() <= 2


@pytest.mark.parametrize("search", ["halving", "zero_order", "particles", "noise"])
def test_final_images_bear_the_watermark_of_the_pipeline_and_previews_do_not(search):
    class Watermarker:  # of diffusers' StableDiffusionXLWatermarker's interface: images in [-1, 1], not clamped
        rows = 0

        def apply_watermark(self, images: Tensor) -> Tensor:
            self.rows += len(images)
            return (0.5 * images.cpu() + 0.25).clamp(-1, 1)

    pipe = pipelines.stable_diffusion_xl()
    pipe.watermark = Watermarker()
    call = {**CALL, "num_inference_steps": 2, "guidance_scale": 1.0}
    found = {
        "halving": make(pipe, n=3, pruning=Halving(at=(0.5,), keep=0.5)),
        "zero_order": make(pipe, n=3, search="zero_order"),
        "particles": ParticleSteering(pipe, corner, particles=3, progress=False),
        "noise": NoiseOptimizer(pipe, corner, iterations=1, progress=False),
    }[search](PROMPT, **call)
    assert pipe.watermark.rows == {"halving": 2, "noise": 1}.get(search, 3)
    if search == "particles":  # no seed makes it again
        return
    own = {} if found.noises is None else {"latents": found.noises[0]}
    made = pipe(PROMPT, generator=torch.Generator().manual_seed(found.winners[0]), **own, **call).images[0]
    assert np.abs(pixels_of(found.images[0]) - pixels_of(made)).max() <= 2


def test_zero_order_search_continues_from_the_best_noise(sd, monkeypatch):
    plan = ZeroOrder(neighbors=3, radius=0.3)
    found = make(sd, n=9, top_k=9, search=plan, batch_size=2)(PROMPT, seed=4, **CALL)
    assert found.noises is not None
    noises = dict(zip(found.winners, found.noises, strict=True))
    assert found.seeds == [number if number < 7 else None for number in found.winners]
    scores = dict(zip(found.all_seeds, found.all_scores, strict=True))
    fresh = {s: torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in found.all_seeds}
    for first in (4, 7, 10):
        earlier = [seed for seed in found.all_seeds if seed < first]
        pivot = max(earlier, key=lambda seed: scores[seed]) if earlier else None
        for seed in range(first, first + 3):
            near = fresh[seed] if pivot is None else math.sqrt(0.91) * noises[pivot] + 0.3 * fresh[seed]
            torch.testing.assert_close(noises[seed], near)
    again = sd(PROMPT, latents=found.noises[0], generator=torch.Generator().manual_seed(0), **CALL).images[0]
    assert np.abs(pixels_of(found.images[0]) - pixels_of(again)).max() <= 2
    monkeypatch.setattr(sd, "scheduler", EulerAncestralDiscreteScheduler.from_config(sd.scheduler.config))
    call = {**CALL, "num_inference_steps": 3, "guidance_scale": 1.0}
    found = make(sd, n=4, search=ZeroOrder(neighbors=2, radius=0.3))(PROMPT, seed=4, **call)
    assert found.noises is not None
    for drawn in (True, False):  # it draws noise on its way, from where the initial noise has left the generator
        generator = torch.Generator().manual_seed(found.winners[0])
        if drawn:
            torch.randn(found.noises[0].shape, generator=generator)
        again = sd(PROMPT, latents=found.noises[0], generator=generator, **call).images[0]
        assert (np.abs(pixels_of(found.images[0]) - pixels_of(again)).max() <= 2) == drawn


@pytest.mark.slow
def test_diverse_winners_are_among_the_best_and_farther_apart():
    pipe = load_embedded_pipeline()
    call = {"num_inference_steps": 3, "guidance_scale": 2.0}

    def bright(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    plain, wide, pool = (
        make(pipe, n=16, reward=bright, top_k=k, diverse=diverse, batch_size=16)("a red apple", **call)
        for k, diverse in ((3, False), (3, True), (12, False))
    )
    assert wide.seeds[0] == plain.seeds[0]
    assert set(wide.seeds) <= set(pool.seeds)
    assert wide.scores == sorted(wide.scores, reverse=True)

    def narrowest(images: list[Any]) -> float:
        small = [np.asarray(image.resize((16, 16)), float) for image in images]
        return min(np.linalg.norm(a - b) for i, a in enumerate(small) for b in small[:i])

    assert narrowest(wide.images) > narrowest(plain.images)


def test_what_our_loop_does_not_support_is_refused_by_name(sd):
    with pytest.raises(ValueError, match=r"^ip_adapter_image: .*plain best of N"):
        make(sd, pruning="halving")(PROMPT, ip_adapter_image=object(), **CALL)
    with pytest.raises(ValueError, match=r"^prompt: BestOfN\(pruning=\.\.\.\) encodes"):
        make(sd, pruning="halving", reward_prompt="x")(None, prompt_embeds=torch.zeros(1, 77, 32), **CALL)
    with pytest.raises(TypeError, match=r"^pipe: BestOfN\(search=\.\.\.\) .*StableDiffusionPipeline.*got function"):
        make(lambda prompt, **_: prompt, search="zero_order")(PROMPT)

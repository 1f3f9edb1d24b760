import math
import weakref
from collections import UserList
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pipelines
import pytest
import torch
from PIL import Image
from pipelines import FAMILIES, FEW_STEPS
from pipelines_with_images import pipeline_with_images
from test_bound import Lengths
from torch import Tensor, nn

from aigiqa_reward import BestOfN, rerank
from aigiqa_reward.sampling import NothingRankedError
from aigiqa_reward.sampling.pipeline_utils import PromptMemo, repeated
from aigiqa_reward.sampling.rollout import Rollout

PROMPT = "a cat on a mat"
SOME = [pytest.param(name, marks=() if name in ("sd", "sd3", "flux") else pytest.mark.slow) for name in FAMILIES]


def corner(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(prompts) == len(images)
    return images[:, 0, :4, :4].mean(dim=(1, 2))


def make(pipe: Any, n: int = 6, reward: Any = corner, **arguments: Any) -> BestOfN:
    return BestOfN(pipe, reward, n=n, progress=False, **arguments)


def again(pipe: Any, seed: int, prompt: str | None = PROMPT, **arguments: Any) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipe(prompt, generator=generator, **FEW_STEPS, **arguments).images[0]).astype(int)


def farthest(images: list[Image.Image], others: list[np.ndarray]) -> int:
    pairs = zip(images, others, strict=True)
    return max(int(np.abs(np.asarray(image).astype(int) - other).max()) for image, other in pairs)


def text_encoders(pipe: Any) -> list[nn.Module]:
    named = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    return [encoder for encoder in named if encoder is not None]


def count_forwards(modules: list[nn.Module]) -> list[int]:
    calls: list[int] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def attributes(pipe: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(pipe).items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def sd() -> Any:
    return pipelines.stable_diffusion()


@pytest.mark.parametrize("family", SOME)
def test_winners_are_the_pipelines_own_images_whatever_the_batch_size(family):
    pipe = FAMILIES[family]()
    again(pipe, 0)
    before, state = attributes(pipe), torch.get_rng_state()
    one, four = (make(pipe, n=5, top_k=5, batch_size=size)(PROMPT, seed=3, **FEW_STEPS) for size in (1, 4))
    assert attributes(pipe) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert one.all_seeds == four.all_seeds == list(range(3, 8))
    assert one.seeds == four.seeds
    assert four.all_scores == pytest.approx(one.all_scores, abs=1e-3)
    assert max(one.all_scores) - min(one.all_scores) > 0.05  # else the comparison would mean little
    assert one.scores == sorted(one.all_scores, reverse=True)
    own = [again(pipe, seed) for seed in one.seeds]
    assert farthest(one.images, own) == 0
    assert farthest(four.images, own) <= 2
    assert np.abs(own[0] - own[1]).max() > 50  # seeds differ far more than that
    for image, score in zip(four.images, four.scores, strict=True):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        assert float(corner(pixels, [PROMPT])) == pytest.approx(score, abs=1 / 255)


@pytest.mark.parametrize("family", SOME)
def test_the_prompt_is_encoded_once(family):
    pipe = FAMILIES[family]()
    calls = count_forwards(text_encoders(pipe))
    again(pipe, 0)
    once = list(calls)
    assert len(once) >= len(text_encoders(pipe))
    for n, batch_size in ((1, 1), (4, 4), (5, 3)):
        calls.clear()
        make(pipe, n=n, batch_size=batch_size)(PROMPT, **FEW_STEPS)
        assert calls == once, (n, batch_size)


def test_prompt_embeddings_of_the_user(sd):
    with torch.no_grad():
        given = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        positive, negative = sd.encode_prompt(PROMPT, **given)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    out = make(sd, batch_size=4, top_k=6, reward_prompt=PROMPT)(**embeds, **FEW_STEPS)
    from_text = make(sd, batch_size=4, top_k=6)(PROMPT, **FEW_STEPS)
    assert out.seeds == from_text.seeds
    assert out.scores == pytest.approx(from_text.scores, abs=1e-6)
    assert farthest(out.images[:1], [again(sd, out.seeds[0], None, **embeds)]) <= 2
    with pytest.raises(ValueError, match="prompt_embeds: expected embeddings of one prompt"):
        make(sd, reward_prompt=PROMPT)(None, prompt_embeds=torch.zeros(2, 77, 32), **FEW_STEPS)


def test_pipelines_with_an_image_have_no_loop_of_ours_and_outputs_must_be_tensors():
    pipe, arguments = pipeline_with_images("sd StableDiffusionImg2Img")
    with pytest.raises(TypeError, match=rf"^pipe: BestOfN\(pruning=\.\.\.\) .*got {type(pipe).__name__}\. Plain"):
        make(pipe, n=4, pruning="halving")(PROMPT, **arguments)
    with pytest.raises(TypeError, match=r"pipe: expected an output whose .images is a tensor"):
        make(lambda prompt, **more: pipe(prompt, **{**more, "output_type": "pil"}))(PROMPT, **arguments)


def test_encodings_that_must_not_be_guessed_are_not():
    embedding, pooled = torch.zeros(1, 7, 8), torch.zeros(1, 8)
    found = repeated((embedding, pooled, torch.zeros(7, 3), None, torch.ones(1, 7, dtype=torch.bool)), 2)
    assert [part if part is None else part.shape for part in found] == [(2, 7, 8), (2, 8), (7, 3), None, (2, 7)]
    assert len(repeated([torch.zeros(7, 8)], 2)) == 2
    for unknown in (
        (torch.zeros(1, 1, 8), pooled, torch.zeros(1, 3)),  # ids or features?
        (embedding, torch.zeros(32, 1, 7, 8)),  # layers first (HiDream)
        (embedding, pooled, torch.tensor([0, 7])),  # cumulative lengths (Kandinsky 5)
        (embedding, [embedding]),  # over layers or over prompts?
        (torch.zeros(2, 7, 8), pooled),
        {"prompt_embeds": embedding},
    ):
        assert repeated(unknown, 2) is None


def test_kept_encodings_are_bounded_follow_the_arguments_and_are_copies():
    calls: list[str] = []

    class Encoder:
        def encode_prompt(self, prompt: Any, num_images_per_prompt: int = 1, **more: Any) -> Tensor:
            calls.append(prompt)
            return torch.full((num_images_per_prompt, 2, 3), float(len(prompt)))

    encoder = Encoder()
    memo = PromptMemo(encoder)
    with memo.installed():
        for count in (2, 1, 2):
            found = encoder.encode_prompt("ab", count)
            assert torch.equal(found, torch.full((count, 2, 3), 2.0))
            found.fill_(7)  # what a pipeline does in place must not reach the kept encoding
        assert encoder.encode_prompt(prompt="ab", num_images_per_prompt=5, scale=None).shape == (5, 2, 3)
        assert calls == ["ab", "ab"]  # another argument may mean another encoding
        for _ in range(100):
            encoder.encode_prompt([torch.zeros(1)])
        assert len(memo._known) <= 16
    assert "encode_prompt" not in vars(encoder)


def test_arguments_reach_the_pipeline(sd):
    steps = []
    more = {"negative_prompt": "a dog", "guidance_scale": 4.0, "height": 48, "width": 24}
    watched = {"callback_on_step_end": lambda pipe, step, timestep, tensors: steps.append(step) or tensors}
    result = make(sd, n=2, batch_size=1)(PROMPT, **{**FEW_STEPS, **more, **watched})
    assert (steps, result.images[0].size) == ([0, 1, 0, 1], (24, 48))
    generator = torch.Generator().manual_seed(result.seeds[0])
    own = sd(PROMPT, generator=generator, **{**FEW_STEPS, **more}).images[0]
    assert np.array_equal(np.asarray(own), np.asarray(result.images[0]))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"n": 2.0}, TypeError, "^n: expected an integer of at least 1, got .*pass a whole"),
        ({"n": 0}, ValueError, "^n: expected an integer of at least 1, got 0"),
        ({"n": 4, "top_k": 5}, ValueError, "top_k: expected at most n=4, got 5"),
        ({"pruning": [8, 4]}, ValueError, "pruning: .*expected None, .halving. or a Halving, got"),
        ({"search": "x"}, ValueError, "^search: expected .*, got 'x'$"),
        ({"pruning": "halving", "search": "zero_order"}, ValueError, "^pruning, search: pass one of them"),
        ({"pipe": "stable-diffusion"}, TypeError, "pipe: expected a diffusers pipeline, got str"),
        ({"reward": None}, TypeError, "reward: expected a Reward, its name or a function.*got NoneType"),
        ({"reward_prompt": " "}, ValueError, "reward_prompt: expected a text"),
    ],
)
def test_constructor_arguments_are_checked(sd, arguments, error, match):
    with pytest.raises(error, match=match):
        BestOfN(**{"pipe": sd, "reward": corner, **arguments})


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [(None, ValueError, "prompt: .*reward_prompt="), (["a cat", "a dog"], TypeError, "one prompt per call.*loop")],
)
def test_unusable_prompts_raise_before_anything_is_sampled(prompt, error, match):
    pipe = pipelines.stable_diffusion()
    calls = count_forwards([pipe.unet, *text_encoders(pipe)])
    with pytest.raises(error, match=match):
        make(pipe).stream(prompt, **FEW_STEPS)  # already here, not at the first output
    assert calls == []


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64 - 3])
def test_seeds_beyond_a_generators_and_arguments_that_it_sets_are_refused(sd, seed):
    for last in (-(2**63), 2**64 - 1):
        torch.Generator().manual_seed(last)
    with pytest.raises(ValueError, match=r"seed: expected an integer in \[-2\*\*63, 2\*\*64 - 4\]"):
        make(sd, n=4).stream(PROMPT, seed=seed, **FEW_STEPS)
    for name in ("generator", "latents", "num_images_per_prompt", "output_type", "return_dict"):
        with pytest.raises(ValueError, match=f"^{name}: BestOfN sets this argument.*; "):
            make(sd)(PROMPT, **{name: None}, **FEW_STEPS)
    for plan in ({}, {"pruning": "halving"}):
        with pytest.raises(ValueError, match=r"^negative_prompt: 'half \\ud83d' has half of a character"):
            make(sd, **plan)(PROMPT, negative_prompt="half \ud83d", **FEW_STEPS)
    with pytest.raises(ValueError, match=r"^negative_prompt: .* has half of a character"):
        Rollout(sd, negative_prompt="half \ud83d")


def test_the_rewards_prompt_is_encoded_once_and_both_aspects_are_reported(sd):
    reward = Lengths()
    out = make(sd, n=7, top_k=2, batch_size=3, reward=reward)(PROMPT, **FEW_STEPS)
    assert reward.encoded == [[PROMPT]]
    assert [len(images) for images in reward.seen] == [3, 3, 1]
    assert out.all_correspondence == [len(PROMPT)] * 7
    assert out.all_scores == pytest.approx([quality + len(PROMPT) for quality in out.all_quality])
    places = [out.all_seeds.index(seed) for seed in out.seeds]
    assert out.scores == [out.all_scores[place] for place in places]
    assert out.quality == [out.all_quality[place] for place in places]
    assert out.correspondence == [len(PROMPT)] * 2


def test_reward_prompt_is_what_the_reward_sees_and_nothing_else(sd):
    seen: list[str] = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        assert (images.dtype, images.shape[1:], torch.is_grad_enabled()) == (torch.float32, (3, 32, 32), False)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        seen.extend(prompts)
        return corner(images, prompts)

    out = make(sd, n=3, reward=reward, reward_prompt="a dog")(PROMPT, **FEW_STEPS)
    assert seen == ["a dog"] * 3
    plain = make(sd, n=3)(PROMPT, **FEW_STEPS)
    assert out.all_scores == plain.all_scores == plain.all_quality
    assert plain.correspondence is plain.all_correspondence is None  # of a reward with one aspect
    make(sd, n=1, reward=reward, reward_prompt="a dog")("", **FEW_STEPS)  # an unconditional image


def test_memory_does_not_grow_with_n():
    pipe, references, scoring = pipelines.stable_diffusion(), [], []
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: references.append(weakref.ref(output)))

    def alive() -> int:
        return sum(reference() is not None for reference in references)

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        scoring.append(alive())
        references.append(weakref.ref(images))
        return corner(images, prompts)

    for out in make(pipe, n=12, batch_size=4, reward=reward).stream(PROMPT, **FEW_STEPS):
        assert len(out.images) == 1
        assert alive() == 0  # the winners are PIL images
    assert len(references) == 6
    assert max(scoring) <= 1


def out_of_memory_over(module: nn.Module, limit: int) -> list[int]:
    tried: list[int] = []

    def refuse(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        tried.append(len(args[0]))
        if len(args[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    module.register_forward_pre_hook(refuse)
    return tried


def test_a_chunk_out_of_memory_is_halved_with_the_same_result():
    expected = make(pipelines.stable_diffusion(), n=11, top_k=3, batch_size=1)(PROMPT, **FEW_STEPS)
    pipe = pipelines.stable_diffusion()
    tried = out_of_memory_over(pipe.unet, limit=4)  # guidance doubles the batch: two images fit
    calls = count_forwards(text_encoders(pipe))
    out = make(pipe, n=11, top_k=3, batch_size=8)(PROMPT, **FEW_STEPS)
    assert out.all_seeds == expected.all_seeds
    assert out.seeds == expected.seeds
    assert out.all_scores == pytest.approx(expected.all_scores, abs=1e-3)
    assert farthest(out.images, [np.asarray(image).astype(int) for image in expected.images]) <= 2
    # 16 and 8 fail in the first step; then two images a chunk, two steps each, and the last one alone
    assert tried == [16, 8, *[4] * 10, 2, 2]
    assert len(calls) == 2


def spoil(pipe: Any, seeds: set[int]) -> None:
    marks = {}
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        marks[seed] = torch.randn((1, 4, 16, 16), generator=generator)[0]
    drawn: dict[str, Tensor] = {}
    prepare = pipe.prepare_latents

    def remember(*args: Any, **kwargs: Any) -> Tensor:
        drawn["latents"] = prepare(*args, **kwargs)
        return drawn["latents"]

    def break_rows(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        for row, latent in enumerate(drawn["latents"]):
            if any(torch.equal(latent, mark) for mark in marks.values()):
                output[row, 0, 0, 0] = math.nan
        return output

    pipe.prepare_latents = remember
    pipe.vae.decoder.register_forward_hook(break_rows)


def test_non_finite_images_never_reach_the_reward_and_are_named():
    pipe = pipelines.stable_diffusion()
    expected = make(pipe, n=6, top_k=6)(PROMPT, **FEW_STEPS)
    spoil(pipe, {expected.seeds[0], 3})
    seen: list[int] = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        assert torch.isfinite(images).all()
        seen.append(len(images))
        return corner(images, prompts)

    bad = sorted({expected.seeds[0], 3})
    with pytest.warns(UserWarning, match="candidates were dropped") as caught:
        out = make(pipe, n=6, batch_size=3, reward=reward)(PROMPT, **FEW_STEPS)
    assert len(caught) == 1
    assert f"seed {', '.join(map(str, bad))}: NaN" in str(caught[0].message)
    assert sum(seen) == 6 - len(bad)
    assert sorted(out.dropped) == bad
    assert [seed for seed, score in zip(out.all_seeds, out.all_scores, strict=True) if math.isnan(score)] == bad
    assert out.seeds == [next(seed for seed in expected.seeds if seed not in bad)]
    assert all(math.isnan(out.all_quality[seed]) for seed in bad)
    with pytest.warns(UserWarning, match=f"only {6 - len(bad)} of top_k=6 are returned"):
        assert len(make(pipe, n=6, top_k=6)(PROMPT, **FEW_STEPS).images) == 6 - len(bad)
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: output * math.nan)
    with pytest.raises(NothingRankedError, match=r"none of the 3 candidates could be ranked.*NaN") as failed:
        make(pipe, n=3)(PROMPT, **FEW_STEPS)
    assert (list(failed.value.output.dropped), failed.value.output.images) == ([0, 1, 2], [])
    assert "encode_prompt" not in vars(pipe)


def test_stream_yields_the_best_so_far_and_can_be_left_and_the_pipeline_used_in_between():
    pipe = pipelines.stable_diffusion()
    calls = count_forwards([pipe.vae.decoder])
    stream = make(pipe, n=64, batch_size=2).stream(PROMPT, **FEW_STEPS)
    other = make(pipe, n=4, batch_size=1).stream("a dog", **FEW_STEPS)
    outputs = [next(stream), next(other), next(stream)]
    assert "encode_prompt" not in vars(pipe)
    assert torch.is_grad_enabled()
    stream.close()
    other.close()
    assert [len(output.all_scores) for output in outputs] == [2, 1, 4]
    assert sum(calls) == 5
    full = make(pipe, n=4, batch_size=2)(PROMPT, **FEW_STEPS)
    assert (outputs[2].all_scores, outputs[2].seeds) == (full.all_scores, full.seeds)
    assert outputs[0].scores == [max(full.all_scores[:2])]


def test_errors_of_the_pipeline_leave_it_as_it_was():
    pipe = pipelines.stable_diffusion()
    before = attributes(pipe)
    with pytest.raises(ValueError, match="Cannot forward both"):
        make(pipe)(PROMPT, prompt_embeds=torch.zeros(1, 77, 32))
    with pytest.raises(TypeError, match="should be the same type"):  # from inside encode_prompt
        make(pipe)(PROMPT, negative_prompt=["a dog"])
    out_of_memory_over(pipe.unet, limit=1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        make(pipe)(PROMPT, **FEW_STEPS)
    assert "enable_model_cpu_offload" in caught.value.__notes__[0]
    assert attributes(pipe) == before


def test_a_pipeline_without_a_number_of_images_is_called_one_at_a_time(sd):
    calls = []

    def pipe(prompt: str, generator: torch.Generator, output_type: str = "pil", **arguments: Any) -> Any:
        calls.append(generator)
        return sd(prompt, generator=generator, output_type=output_type, **arguments)

    out = make(pipe, n=3, batch_size=4)(PROMPT, **FEW_STEPS)
    assert [generator.initial_seed() for generator in calls] == [0, 1, 2]
    assert out.all_scores == make(sd, n=3, batch_size=1)(PROMPT, **FEW_STEPS).all_scores


@pytest.mark.parametrize("sequentially", [False, True])
def test_offloaded_weights_work_also_after_running_out_of_memory(sequentially):
    plain = make(pipelines.stable_diffusion(), n=5, batch_size=2)(PROMPT, **FEW_STEPS)
    pipe = pipelines.stable_diffusion()
    out_of_memory_over(pipe.unet, limit=4)
    if sequentially:
        for module in (pipe.unet, pipe.text_encoder, pipe.vae):
            accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    else:
        pipe.enable_model_cpu_offload(device="cpu")
    out = make(pipe, n=5, batch_size=4)(PROMPT, **FEW_STEPS)
    assert out.all_scores == pytest.approx(plain.all_scores, abs=1e-3)
    assert sequentially or len(pipe._all_hooks) >= 3
    assert not sequentially or (next(pipe.unet.parameters()).device.type == "meta" and hasattr(pipe.unet, "_hf_hook"))


@pytest.fixture
def gallery(tmp_path: Path) -> list[Any]:
    levels = (0.2, 0.8, 0.4, 0.6, 0.8)
    arrays = [np.full((20 + 4 * i, 40 - 4 * i, 3), level, np.float32) for i, level in enumerate(levels)]
    first, second = (Image.fromarray((array * 255).round().astype(np.uint8)) for array in arrays[:2])
    second.save(path := tmp_path / "image.png")
    return [first, path, arrays[2], torch.from_numpy(arrays[3]).permute(2, 0, 1), str(path)]


def test_rerank_orders_mixed_inputs(gallery):
    out = rerank(gallery, PROMPT, corner)
    assert out.seeds == [1, 4, 3, 2, 0]
    assert out.all_seeds == [0, 1, 2, 3, 4]
    assert out.all_scores == pytest.approx([0.2, 0.8, 0.4, 0.6, 0.8], abs=1 / 255)
    assert out.scores == [out.all_scores[index] for index in out.seeds]
    assert [image.size for image in out.images] == [(36, 24), (36, 24), (28, 32), (32, 28), (40, 20)]
    best = rerank(gallery, PROMPT, corner, top_k=2)
    assert (best.seeds, len(best.images), best.all_scores) == ([1, 4], 2, out.all_scores)
    without = rerank(gallery, None, lambda images, prompts: corner(images, prompts or [""] * len(images)))
    assert (without.seeds, without.correspondence) == (out.seeds, None)


def test_rerank_of_a_batch_agrees_with_a_list():
    images = torch.rand(19, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reward = Lengths()
    batch, listed = rerank(images, PROMPT, reward), rerank(list(images), PROMPT, reward)
    assert reward.encoded == [[PROMPT]] * 2
    assert batch.all_scores == listed.all_scores
    expected = images.mean(dim=(1, 2, 3)) + len(PROMPT)
    assert batch.all_scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert batch.seeds == listed.seeds == sorted(range(19), key=lambda index: -batch.all_scores[index])
    for other in (
        tuple(images),
        UserList(images),
        images.permute(0, 2, 3, 1).numpy(),
    ):  # as a column of datasets
        assert rerank(other, PROMPT, reward).all_scores == batch.all_scores


def test_rerank_drops_what_it_cannot_read(gallery, tmp_path):
    broken = torch.full((3, 16, 16), math.nan)
    with pytest.warns(UserWarning, match="2 of 7 candidates were dropped.*no such file") as caught:
        out = rerank([broken, *gallery, tmp_path / "missing.png"], PROMPT, corner)
    assert len(caught) == 1
    assert out.seeds == [2, 5, 4, 3, 1]
    assert sorted(out.dropped) == [0, 6]
    assert "NaN" in out.dropped[0]
    assert math.isnan(out.all_scores[0])
    with pytest.raises(RuntimeError, match="none of the 1 candidates"):
        rerank([broken], PROMPT, corner)


@pytest.mark.parametrize(
    ("images", "prompt", "top_k", "error", "match"),
    [
        ([], PROMPT, None, ValueError, "images: expected at least one"),
        ("image.png", PROMPT, None, TypeError, r"images: expected a list.*got str"),
        (torch.zeros(3, 16, 16), PROMPT, None, ValueError, "images: expected a batch of 4 dimensions"),
        (torch.zeros(1, 3, 16, 16), [PROMPT], None, TypeError, "one prompt per call"),
        (torch.zeros(1, 3, 16, 16), " ", None, ValueError, "prompt: expected a text"),
        (torch.zeros(5, 3, 16, 16), PROMPT, 6, ValueError, "top_k: expected at most 5"),
    ],
)
def test_rerank_refuses_what_it_cannot_use(images, prompt, top_k, error, match):
    with pytest.raises(error, match=match):
        rerank(images, prompt, corner, top_k=top_k)

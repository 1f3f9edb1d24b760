"""What holds for every fine-tuning algorithm: gradients, parts, memory, precision, settings, refusals."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from algorithm_runs import (
    PLAIN,
    batch_of,
    batches,
    changed,
    context_of,
    flat,
    gradient,
    loss_of,
    precise,
    put,
    run_backward,
    slope,
    take_gradient,
    write_pairs,
)
from diffusers import HeunDiscreteScheduler
from finetuned import PROMPTS, warmth
from safetensors.torch import load, save
from torch import Tensor

from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning import (
    ALGORITHMS,
    DDPO,
    DPO,
    DiffusionNFT,
    DRaFT,
    FinetuneConfig,
    FlowGRPO,
    ReFL,
)
from aigiqa_reward.finetuning.algorithms.base import Algorithm
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.optimizers import accelerator_of

CASES: dict[str, Algorithm] = {
    "draft": DRaFT(truncation_steps="all"),
    "draft-lv": DRaFT(low_variance=2),
    "alignprop": DRaFT(truncation_steps="random"),
    "draft-sharpness": DRaFT(sharpness_aware="image"),
    "refl": ReFL(earliest=0.0),
    "dpo": DPO(beta=50.0),
    "dpo-refresh": DPO(beta=50.0, refresh_every=2, candidates=2),
    "ddpo": DDPO(images_per_prompt=2, clip_range=0.5),
    "grpo": FlowGRPO(images_per_prompt=2, clip_range=0.5),
    "grpo-ancestral": FlowGRPO(images_per_prompt=2, clip_range=0.5, sampler="ancestral"),
    "nft": DiffusionNFT(images_per_prompt=2, beta=0.5),
}
FAST = ("draft", "refl", "dpo", "ddpo", "grpo", "nft")
EVERY = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES]
STEPS = {**PLAIN, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreferencePairs:
    return write_pairs(tmp_path_factory.mktemp("images"), 4)


@pytest.fixture(scope="module")
def contexts() -> dict[bool, TrainingContext]:
    return {False: context_of(precise(), call=STEPS), True: context_of(flow().to(torch.float64), call=STEPS)}


def flow() -> Any:
    pipe = pipelines.stable_diffusion_3()
    pipe.vae.decoder.conv_out.weight.data *= 0.3
    return pipe


def case(name: str, pairs: PreferencePairs) -> Algorithm:
    algorithm = CASES[name]
    return replace(algorithm, pairs=pairs) if name == "dpo" else algorithm


@pytest.fixture
def setting(request: pytest.FixtureRequest, pairs: PreferencePairs, contexts: Any) -> tuple[Algorithm, TrainingContext]:
    algorithm = case(request.param, pairs)
    return algorithm, contexts[isinstance(algorithm, FlowGRPO)]


every = pytest.mark.parametrize("setting", EVERY, indirect=True)


@every
def test_the_gradient_lowers_the_loss_and_is_the_adapters_alone(setting: Any) -> None:
    algorithm, context = setting
    parts = batches(range(4), group=2)
    with torch.no_grad():
        memory = algorithm.prepare(context, parts)
    found = gradient(context, algorithm, *parts, memory=memory)
    assert bool(found.isfinite().all())
    others = [w for n, w in context.lora.denoiser.named_parameters() if n not in context.lora.weights]
    assert all(weight.grad is None and not weight.requires_grad for weight in others)
    down = slope(context, lambda: loss_of(algorithm, context, parts, memory), -found / found.norm())
    assert down < 0
    cut = isinstance(algorithm, DRaFT | ReFL) and algorithm.settings().get("draft.truncation_steps") != "all"
    if not (cut or isinstance(algorithm, DiffusionNFT)):  # an earlier step, or an error that divides, has no gradient
        assert -down == pytest.approx(float(found.norm()), rel=1e-4)


@every
def test_a_batch_in_parts_has_the_gradient_of_the_whole(setting: Any) -> None:
    algorithm, context = setting
    splits = ([range(4)], [[3, 0], [1, 2]])
    whole, parts = (gradient(context, algorithm, *batches(*split, group=2)) for split in splits)
    # Scores, noise and latents of images are kept in float32, whose rounding is all that differs.
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5 * float(whole.norm()))


@every
def test_a_round_is_resumed_from_what_a_checkpoint_keeps(setting: Any) -> None:
    algorithm, context = setting
    parts = batches([0, 1], [2, 3], group=2)
    with torch.no_grad():
        memory = dict(algorithm.prepare(context, parts))
        again = algorithm.prepare(context, parts)
    assert all(torch.equal(memory[name], again[name]) for name in memory)
    later = [replace(batch, step=1) for batch in parts] if algorithm.steps_per_round > 1 else parts
    found = gradient(context, algorithm, *later, memory=load(save(memory)))
    assert torch.equal(found, gradient(context, algorithm, *later, memory=memory))


@every
def test_gradient_checkpointing_changes_nothing(setting: Any) -> None:
    algorithm, context = setting
    found, again = (
        gradient(changed(context, checkpointed=on, penalty=0.1), algorithm, batch_of([0, 1], group=2))
        for on in (False, True)
    )
    torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-9 * float(found.norm()))


@every
def test_the_penalty_is_added_and_logged(setting: Any) -> None:
    algorithm, context = setting
    parts = batches([0, 1], group=2)
    (free,), (paid,) = (run_backward(algorithm, changed(context, penalty=p), parts) for p in (0.0, 2.0))
    take_gradient(context)
    for one, other in zip(free, paid, strict=True):
        kl = other.measures["kl"].mean()
        assert kl > 0
        torch.testing.assert_close(other.loss, one.loss + 2 * kl / len(free))
        assert ("kl" in one.measures) == isinstance(algorithm, DPO), "what is not computed is not logged"
    start = flat(context)
    put(context, torch.cat([w.flatten() * ("lora_B" not in n) for n, w in context.lora.weights.items()]))
    (outcomes,) = run_backward(algorithm, changed(context, penalty=2.0), parts)
    take_gradient(context)
    put(context, start)
    assert all(outcome.measures["kl"].abs().max() == 0 for outcome in outcomes), "an adapter that changes nothing"


@pytest.mark.parametrize("name", [param for param in EVERY if param.values != ("grpo-ancestral",)])
def test_mixed_precision_keeps_the_gradient(name: str, pairs: PreferencePairs, tmp_path: Path) -> None:
    """Not of the ancestral sampler, whose small noise magnifies rounding."""
    algorithm = case(name, pairs)
    context = context_of(flow() if isinstance(algorithm, FlowGRPO) else pipelines.stable_diffusion(), moved=0.1)
    parts = batches(range(2), group=2)
    with torch.no_grad():
        memory = algorithm.prepare(context, parts)
    expected = gradient(context, algorithm, *parts, memory=memory)
    context.accelerator = accelerator_of(FinetuneConfig(mixed_precision="bf16"), tmp_path, torch.device("cpu"), None)
    with context.accelerator.autocast():
        outcomes = list(algorithm.losses(context, parts[0], 0, memory))
    for outcome in outcomes:
        outcome.loss.backward()
    found = take_gradient(context)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.9
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.25)


OTHER: dict[str, dict[str, Any]] = {
    "draft": {"truncation_steps": "random", "low_variance": 1, "sharpness_aware": "both"},
    "refl": {"earliest": 0.5, "sharpness_aware": "parameters"},
    "dpo": {"loss": "ipo", "timesteps": "sampler", "refresh_every": 3},
    "ddpo": {"updates_per_round": 3, "clip_range": 0.1, "eta": 0.5},
    "grpo": {"advantage_clip": 1.0, "sampler": "ancestral"},
    "nft": {"beta": 0.1, "old_decay": 0.999, "old_decay_slope": 0.0075},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settings_identify_an_algorithm_and_say_what_they_are(name: str) -> None:
    kind: Any = ALGORITHMS[name]
    algorithm = kind()
    assert algorithm == kind() and algorithm.settings() == kind().settings()
    for field in fields(kind):
        help_text = field.metadata.get("help")
        assert field.name == "pairs" or (help_text.endswith(".") and "\n" not in help_text)
    for key, value in OTHER[name].items():
        other = kind(**{key: value}).settings()
        assert [n for n, v in other.items() if v != algorithm.settings()[n]] == [f"{name}.{key}"]


BAD: list[tuple[Any, dict[str, Any]]] = [
    *((DRaFT, {"truncation_steps": steps}) for steps in (0, 1.5, "some", True)),
    (DRaFT, {"low_variance": 2, "truncation_steps": 2}),
    *((kind, {"sharpness_aware": part}) for kind in (DRaFT, ReFL) for part in ("images", True)),
    *((DRaFT, {name: -1.0, "sharpness_aware": "both"}) for name in ("image_radius", "parameter_radius")),
    (DRaFT, {"image_radius": 0.1}),
    (DRaFT, {"image_radius": 0.1, "sharpness_aware": "parameters"}),
    (ReFL, {"parameter_radius": 0.1, "sharpness_aware": "image"}),
    *((ReFL, {"earliest": share}) for share in (1, -0.1, float("nan"))),
    *((DPO, {name: value}) for name, value in (("beta", 0), ("loss", "kto"), ("timesteps", "late"), ("margin", -0.1))),
    *((DPO, {name: value}) for name, value in (("refresh_every", -1), ("candidates", 1), ("pairs", "made"))),
    (DPO, {"pairs": PreferencePairs(prompts=(), better=(), worse=())}),
    *((DDPO, {name: 0}) for name in ("images_per_prompt", "updates_per_round", "clip_range", "eta")),
    *((DDPO, {name: value}) for name, value in (("advantage_clip", -1.0), ("timestep_fraction", 1.5))),
    *((FlowGRPO, {name: value}) for name, value in (("noise_level", 1.5), ("sampler", "cps"), ("deviation", "x"))),
    *((DiffusionNFT, {name: value}) for name, value in (("images_per_prompt", 1), ("beta", 0), ("beta", 1.5))),
    *((DiffusionNFT, {name: value}) for name, value in (("old_decay", 1.0), ("old_decay_slope", -0.1))),
]


@pytest.mark.parametrize(("kind", "settings"), BAD)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(settings))}: .*(expected|needs)"):
        kind(**settings)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_reward_without_gradients_is_refused_where_they_are_needed(name: str) -> None:
    def numbers(images: Tensor, prompts: list[str]) -> Tensor:
        return warmth(images.detach(), prompts)

    algorithm = ALGORITHMS[name]()
    pipe = pipelines.stable_diffusion_3() if name == "grpo" else pipelines.stable_diffusion()
    context = context_of(pipe, numbers)
    if not algorithm.reward_gradient:
        algorithm.check(context, PROMPTS)
        return
    for refused in (algorithm.check, lambda context, _: next(algorithm.losses(context, batch_of(), 0, {}))):
        with pytest.raises(
            ValueError, match=rf"^reward: {algorithm.title} needs .*numbers .*DPO, DDPO, FlowGRPO or DiffusionNFT"
        ):
            refused(context, PROMPTS)


@pytest.mark.parametrize(
    ("algorithm", "change", "message"),
    [
        (DDPO(), HeunDiscreteScheduler, "scheduler: DDPO cannot serve HeunDiscreteScheduler"),
        (DDPO(), {"eta": 0.5}, r"eta: .* got eta=0\.5 .* leave it out"),
        (FlowGRPO(), {}, "got StableDiffusionPipeline with DDIMScheduler; train it with DDPO"),
        (DiffusionNFT(), "score", "got 'score' of DDIMScheduler"),
        (DPO(), "score", "got 'score' of DDIMScheduler"),
        (DPO(timesteps="sampler"), HeunDiscreteScheduler, "HeunDiscreteScheduler calls .*timesteps='uniform', or"),
    ],
)
def test_schedulers_that_an_algorithm_cannot_train_with_are_refused(algorithm: Any, change: Any, message: str) -> None:
    pipe = pipelines.stable_diffusion()
    if isinstance(change, type):
        pipe.scheduler = change.from_config(pipe.scheduler.config)
    if isinstance(change, str):
        pipe.scheduler.register_to_config(prediction_type=change)
    with pytest.raises(ValueError, match=message):
        algorithm.check(context_of(pipe, call={**PLAIN, **(change if isinstance(change, dict) else {})}), PROMPTS)

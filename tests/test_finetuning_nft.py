"""DiffusionNFT: its loss against closed forms, its rounds, its old policy, resumed trainings."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from algorithm_runs import batch_of, batches, context_of, flat, gradient, precise, put, run_backward, take_gradient
from finetuned import CALL, PROMPTS, stir, warmth
from safetensors.torch import load_file
from test_finetuning_loop import assert_same, train, weights
from torch import Tensor

from aigiqa_reward.finetuning import DiffusionNFT
from aigiqa_reward.finetuning.algorithms.nft import contrast, old_of, shares
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import FILE
from aigiqa_reward.finetuning.noising import Noising

STEPS = {**CALL, "num_inference_steps": 3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope_at(current: Tensor, old: Tensor, clean: Tensor, share: Tensor | float, beta: float) -> Tensor:
    current = current.clone().requires_grad_()
    share = torch.as_tensor(share, dtype=torch.float64).expand(len(clean))
    (found,) = torch.autograd.grad(contrast(current, old, clean, share, beta).sum(), current)
    return found


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_at_the_old_policy_the_gradient_is_the_closed_form_and_zero_for_average_images(beta: float) -> None:
    old, clean, share = normal(5, 2, 3), normal(5, 2, 3, seed=1), torch.linspace(0, 1, 5, dtype=torch.float64)
    error = (old - clean).abs().mean(dim=(1, 2), keepdim=True)
    expected = 2 * (2 * share.view(-1, 1, 1) - 1) * (old - clean) / (6 * error)
    torch.testing.assert_close(slope_at(old, old, clean, share, beta), expected, rtol=1e-12, atol=1e-14)
    assert slope_at(old, old, clean, 0.5, beta).abs().max() < 1e-15


def test_shares_are_those_of_the_paper() -> None:
    found = shares(torch.tensor([-9.0, -5.0, -2.5, 0.0, 1.0, 5.0, math.inf]))
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.6, 1.0, 1.0])


COUNT, SPREAD, NOISE = 400_000, 1.5, 0.8


def gaussian_toy() -> tuple[Tensor, Tensor, float]:
    """Clean x0 from N(0, s^2), its posterior mean given x0 + noise, and the std of their difference."""
    clean = SPREAD * normal(COUNT, 1)
    seen = clean + NOISE * normal(COUNT, 1, seed=1)
    kept = SPREAD**2 / (SPREAD**2 + NOISE**2)
    return clean, kept * seen, math.sqrt(kept) * NOISE


def test_on_a_gaussian_the_mean_gradient_is_the_closed_form() -> None:
    clean, old, left = gaussian_toy()
    better = (clean[:, 0] > 0).double()
    found = slope_at(old, old, clean, better, 1.0)
    # 2 E[sign(x0) sign(u - x0)]: the probability of quadrants, where x0 and x0 - u correlate by left / SPREAD.
    expected = -4 / math.pi * math.asin(left / SPREAD)
    assert float(found.mean()) == pytest.approx(expected, abs=5 * float(found.std()) / math.sqrt(COUNT))


@pytest.mark.parametrize("shift", [-0.6, 0.2])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_away_from_the_old_policy_average_images_pull_to_it(shift: float, beta: float) -> None:
    clean, old, left = gaussian_toy()
    found = slope_at(old + shift, old, clean, 0.5, beta)
    expected = 2 * math.erf(beta * abs(shift) / (left * math.sqrt(2))) * math.copysign(1, shift)
    assert float(found.mean()) == pytest.approx(expected, abs=5 * float(found.std()) / math.sqrt(COUNT))


def flat_reward(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.full((len(images),), 0.3)


def test_equal_images_move_nothing_but_pull_back_what_has_moved() -> None:
    context, algorithm = context_of(precise(), flat_reward, call=STEPS), DiffusionNFT()
    parts = batches(range(4), group=4)
    memory = algorithm.prepare(context, parts)
    assert memory["degenerate/0"].all()
    assert gradient(context, algorithm, *parts, memory=memory).norm() < 1e-12
    start = flat(context)
    put(context, start + 0.1 * normal(len(start)))

    def away() -> float:
        (outcomes,) = run_backward(algorithm, context, parts, memory)
        return sum(float(outcome.measures["old_kl"].mean()) for outcome in outcomes)

    before, found = away(), take_gradient(context)
    put(context, flat(context) - 1e-3 * found / found.norm())
    assert away() < before


def with_scheduler(name: str, **config: Any) -> Any:
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config, **config)
    return pipe


def losses_of(context: TrainingContext, algorithm: DiffusionNFT, memory: Any) -> Tensor:
    return torch.stack([one.loss.detach() for one in algorithm.losses(context, batch_of(range(4), group=4), 0, memory)])


def test_the_same_images_by_another_sampler_have_the_same_loss() -> None:
    """Samplers of a higher order and with noise between the steps sample rounds as well."""
    algorithm = DiffusionNFT()
    names = ("DDIM", "HeunDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep")
    contexts = [context_of(with_scheduler(name), moved=0.1, call=STEPS, penalty=0.1) for name in names]
    first, *others = [algorithm.prepare(context, batches(range(4), group=4)) for context in contexts]
    expected = losses_of(contexts[0], algorithm, first)
    for context, own in zip(contexts[1:], others, strict=True):
        assert not torch.equal(own["latents/0"], first["latents/0"])
        torch.testing.assert_close(losses_of(context, algorithm, first), expected)
        assert bool(losses_of(context, algorithm, own).isfinite().all())


FAMILIES = {**pipelines.FAMILIES, "v": lambda: with_scheduler("DDIM", prediction_type="v_prediction")}
FAST = ("sd", "v", "flux")


def clean_by_hand(kind: str, x: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    if kind in ("sd", "sdxl"):
        return (x - sigma * v) / alpha
    return alpha * x - sigma * v if kind == "v" else x - sigma * v


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in FAMILIES])
def test_every_kind_of_prediction_is_trained_with_the_loss_of_its_x0(kind: str) -> None:
    guidance = {"guidance_scale": 3.5} if kind == "flux" else {}
    context = context_of(FAMILIES[kind](), moved=0.1, call={**STEPS, **guidance})
    algorithm, batch = DiffusionNFT(images_per_prompt=2, beta=0.5), batch_of(range(2), group=2)
    memory = algorithm.prepare(context, [batch])
    stir(context.lora, 0.05, seed=3)
    outcomes = list(algorithm.losses(context, batch, 0, memory))
    noising, state = Noising.of(context.rollout.pipe.scheduler), context.start(batch)
    clean, share = memory["latents/0"], shares(memory["advantages/0"])
    dims, shape = tuple(range(1, clean.ndim)), (-1, *[1] * (clean.ndim - 1))
    for (levels, noised), outcome in zip(algorithm.draw(noising, batch, clean), outcomes, strict=True):
        outputs = []
        for which in (context.lora.state(), old_of(memory)):
            with torch.no_grad(), context.lora.replaced(which):
                outputs.append(context.predict_at(noised, noising.times[levels], state.conditioning, state.shared))
        (new, old), expected = outputs, 0.0
        alpha, sigma = (each[levels].view(shape) for each in (noising.alphas, noising.sigmas))
        for b, weight in ((0.5, share), (-0.5, 1 - share)):
            error = clean_by_hand(kind, noised, (1 - b) * old + b * new, alpha, sigma) - clean
            expected += weight * error.square().mean(dims) / error.abs().mean(dims) / 0.5
        torch.testing.assert_close(outcome.loss.detach(), expected.mean() / 4, rtol=1e-4, atol=1e-5)


def test_images_are_sampled_by_the_old_policy() -> None:
    context, batch = context_of(pipelines.stable_diffusion(), call=STEPS), batch_of(range(2), group=2)
    old = context.lora.state()
    stir(context.lora, 0.3, seed=5)
    trained, context.old = context.lora.state(), old
    memory = DiffusionNFT(images_per_prompt=2).prepare(context, [batch])
    assert_same(context.lora.state(), trained)
    assert_same(old_of(memory), old)
    with torch.no_grad(), context.lora.replaced(old):
        assert_same(context.lora.state(), trained)
        expected = context.rollout.run(context.start(batch)).latents
    assert torch.equal(memory["latents/0"], expected)


def test_an_image_that_is_not_finite_is_left_out() -> None:
    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        totals = warmth(images, prompts).detach()
        totals[1] = math.nan
        return totals

    context = context_of(pipelines.stable_diffusion(), broken, call=STEPS, penalty=0.1)
    algorithm, parts = DiffusionNFT(), batches(range(4), group=4)
    memory = algorithm.prepare(context, parts)
    assert memory["dropped/0"].tolist() == [0, 1, 0, 0] and not memory["latents/0"][1].any()
    (outcomes,) = run_backward(algorithm, context, parts, memory)
    assert all(outcome.measures["kl"][1] == 0 < outcome.measures["kl"][0] for outcome in outcomes)
    assert 0 < take_gradient(context).norm() < math.inf


@pytest.mark.parametrize("group", [2, 3, 4, 7])
@pytest.mark.parametrize("wanted", [(1, 1), (2, 1), (3, 2), (8, 1)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_step_has_whole_prompts_in_parts_that_are_no_larger_than_wanted(group, wanted, processes) -> None:
    size, parts = DiffusionNFT(images_per_prompt=group).split(*wanted, processes)
    rows = size * parts * processes
    least = math.prod(wanted) * processes
    assert size <= wanted[0] and rows % group == 0
    assert least <= rows < least + math.lcm(group, processes)


def test_defaults_train_with_any_batch_size_and_resume_exactly(tmp_path: Path) -> None:
    algorithm = DiffusionNFT(old_decay_slope=0.3)
    settings: dict[str, Any] = {"algorithm": algorithm, "sampling": STEPS, "kl_coeff": None, "checkpointing_steps": 1}
    settings |= {"reward": lambda images, prompts: warmth(images, prompts).detach(), "checkpoints_total_limit": None}
    result = train(tmp_path / "a", max_train_steps=3, train_batch_size=2, **settings)
    names = {"loss", "reward", "kl", "old_kl", "degenerate", "dropped", "grad_norm", "learning_rate"}
    assert all(names <= line.keys() for line in result.history)
    assert result.history[0]["old_kl"] == 0 < result.history[-1]["old_kl"]
    train(tmp_path / "b", max_train_steps=2, train_batch_size=2, **settings)
    train(tmp_path / "b", max_train_steps=3, train_batch_size=2, resume_from_checkpoint="latest", **settings)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    train(tmp_path / "c", max_train_steps=2, train_batch_size=4, **settings)
    for name, tensor in load_file(tmp_path / "a" / "checkpoint-2" / FILE).items():
        torch.testing.assert_close(weights(tmp_path / "c")[name], tensor, rtol=1e-3, atol=1e-4)

    folders = [tmp_path / "a" / f"checkpoint-{step}" for step in (1, 2, 3)]
    new = [load_file(folder / FILE) for folder in folders]
    old = [torch.load(folder / "training_state.pt", weights_only=True)["old"] for folder in folders]
    assert_same(load_file(folders[0] / FILE), new[0])
    for step, decay in ((1, 0.5), (2, 0.5)):
        for name, tensor in new[step].items():
            torch.testing.assert_close(old[step][name], decay * old[step - 1][name] + (1 - decay) * tensor)


@pytest.mark.slow
def test_steps_raise_a_reward_without_gradients_on_noise_that_training_has_not_seen() -> None:
    def red(images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, 0].mean(dim=(1, 2)).detach()

    context, count = context_of(pipelines.stable_diffusion_3(), red, moved=0.0, call=STEPS), 16
    rollout, prompts = context.rollout, [PROMPTS[place % 2] for place in range(count)]

    @torch.no_grad()
    def unseen() -> Tensor:
        generators = [torch.Generator().manual_seed(90_000 + place) for place in range(count)]
        state = rollout.run(rollout.start(context.encode(prompts), generators))
        return context.score(rollout.show(state.latents), prompts).total

    before, algorithm = unseen(), DiffusionNFT(images_per_prompt=8)
    optimizer = torch.optim.AdamW(context.lora.weights.values(), lr=1e-2)
    for step in range(12):
        parts = batches(range(16), group=8, round=step, seed=5)
        memory = algorithm.prepare(context, parts)
        optimizer.zero_grad()
        run_backward(algorithm, context, parts, memory)
        optimizer.step()
        context.old = algorithm.old_weights(context, step + 1, memory)
    gain = unseen() - before
    assert gain.mean() > 4 * gain.std() / math.sqrt(count)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_finetuning_nft as t
t.train(Path(sys.argv[1]), **t.JOINT, train_batch_size=1)
"""
JOINT: dict[str, Any] = {"max_train_steps": 2, "algorithm": DiffusionNFT(), "sampling": STEPS}


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command += [str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = train(tmp_path / "alone", **JOINT, train_batch_size=2)
    lines = [json.loads(line) for line in (tmp_path / "two" / "history.jsonl").read_text().splitlines()]
    for mine, other in zip(alone.history, lines, strict=True):
        for name in ("loss", "reward", "old_kl", "degenerate", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-7), name

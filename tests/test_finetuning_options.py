"""Every option of a training acts: with another value something else runs, or the value is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pipelines
import pytest
import torch
from algorithm_runs import context_of
from diffusers.optimization import get_scheduler
from finetuned import CALL, PROMPTS, warmth
from safetensors import safe_open

from aigiqa_reward.finetuning import ALGORITHMS, DDPO, DPO, DRaFT, FinetuneConfig, finetune
from aigiqa_reward.finetuning.config import Schedule
from aigiqa_reward.finetuning.lora import FILE

BASE: dict[str, Any] = {"rank": 2, "train_batch_size": 4, "max_train_steps": 2, "learning_rate": 1e-2}
BASE |= {"checkpointing_steps": 1, "sampling": {**CALL, "num_inference_steps": 2}}
WITH: dict[str, dict[str, Any]] = {
    "validation_steps": {"validated": True},
    "validation_seeds": {"validated": True},
    "lr_warmup_steps": {"lr_scheduler": "linear"},
    "checkpoints_total_limit": {"max_train_steps": 4},
    "patience": {"validated": True, "max_train_steps": 4, "validation_steps": 1, "learning_rate": 1.0},
    "deviation": {"images_per_prompt": 2},
    "timestep_fraction": {"sampling": {**CALL, "num_inference_steps": 4}},
    "clip_range": {"updates_per_round": 2},
    "pairs_per_prompt": {"candidates": 4},
    "image_radius": {"sharpness_aware": "image"},
    "parameter_radius": {"sharpness_aware": "parameters"},
}
"""Other options with which an option acts."""

CONFIG: dict[str, Any] = {"rank": 3, "lora_alpha": 9.0, "target_modules": ("to_q",), "train_batch_size": 8, "seed": 1}
CONFIG |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "learning_rate": 1e-3, "ema_decay": 0.5}
CONFIG |= {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "max_train_steps": 3, "max_grad_norm": 1e-9}
CONFIG |= {"weight_decay": 0.5, "use_8bit_adam": True, "mixed_precision": "bf16", "kl_coeff": 5.0}
CONFIG |= {"reward_ceiling": -9.0, "checkpointing_steps": 2, "checkpoints_total_limit": 1, "validation_steps": 1}
CONFIG |= {
    "validation_seeds": 2,
    "patience": 1,
    "sampling": {**CALL, "num_inference_steps": 3},
    "push_to_hub": True,
    "hub_model_id": "me/mine",
}
POLICY = {"images_per_prompt": 2, "updates_per_round": 2, "clip_range": 1e-9, "advantage_clip": 0.1}
POLICY |= {"deviation": "batch", "timestep_fraction": 0.5}
SHARPNESS = {"sharpness_aware": "both", "image_radius": 0.1, "parameter_radius": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "draft": {"truncation_steps": 2, "low_variance": 1, **SHARPNESS},
    "refl": {"earliest": 0.0, **SHARPNESS},
    "dpo": {"beta": 10.0, "loss": "ipo", "timesteps": "sampler", "refresh_every": 1, "candidates": 3, "margin": 9.0}
    | {"pairs_per_prompt": 2, "guidance_scales": (1.0, 3.0), "reward_guidance": 5.0},
    "ddpo": {**POLICY, "eta": 0.5},
    "grpo": {**POLICY, "sampler": "ancestral", "noise_level": 0.3, "timestep_fraction": 0.3},
    "nft": {"images_per_prompt": 2, "beta": 0.5, "old_decay": 0.0, "old_decay_slope": 0.5},
}


def colder(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return -warmth(images, prompts)


def trace(folder: Path, name: str, validated: bool = False, **changes: Any) -> str:
    """What a training runs and writes, or why it is refused."""
    kind: Any = ALGORITHMS[name]
    own = {field.name: changes.pop(field.name) for field in fields(kind) if field.name in changes}
    pipe = pipelines.stable_diffusion_3() if name == "grpo" else pipelines.stable_diffusion()
    calls: list[Any] = []
    denoiser: Any = pipe.transformer if name == "grpo" else pipe.unet
    denoiser.register_forward_hook(lambda module, _, out: calls.append(len(out[0])))
    for layer in [layer for layer in denoiser.modules() if hasattr(layer, "to_q")]:  # called again when recomputed
        layer.register_forward_hook(lambda *_: calls.append(0))
    try:
        settings = {**BASE, **({"sampling": {**CALL, "num_inference_steps": 4}} if name == "grpo" else {}), **changes}
        config = FinetuneConfig(**settings)
        given = {"validation_prompts": ["a fox", "a cat"], "holdout": colder} if validated else {}
        result = finetune(pipe, warmth, PROMPTS[:2], kind(**own), folder, config, progress=False, **given)
    except ValueError as error:
        return str(error)
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in result.history]
    lines = [{**line.pop("validation", {}), **line, "seconds": 0} for line in lines]
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
    with safe_open(folder / FILE, "pt") as file:
        kept = [sorted(file.metadata().items()), {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}]
    return repr((calls, lines, files, kept, result.stopped))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.filterwarnings("ignore")
def test_an_option_acts_or_is_refused(name: str, tmp_path: Path) -> None:
    kind: Any = ALGORITHMS[name]
    pipelines.tiny_decoder().save_pretrained(tmp_path / "decoder")
    changed = {**CONFIG, **OPTIONS[name], "decoder": str(tmp_path / "decoder")}
    assert set(changed) == {field.name for field in (*fields(FinetuneConfig), *fields(kind))} - {"pairs"}
    if name == "grpo":
        del changed["patience"]  # its reward does not rise within so few steps, so that nothing stops it
    expected: dict[str, Any] = {}
    idle = []
    assert trace(tmp_path / "a", name) == trace(tmp_path / "b", name)
    for place, (option, value) in enumerate(changed.items()):
        own = WITH.get(option, {})
        if str(own) not in expected:
            expected[str(own)] = trace(tmp_path / f"base {len(expected)}", name, **own)
            assert expected[str(own)].startswith("("), expected[str(own)]
        found = trace(tmp_path / str(place), name, **own, **{option: value})
        if found == expected[str(own)]:
            idle.append(option)
    assert not idle


def test_schedules_differ() -> None:
    rates = set()
    for name in get_args(Schedule):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=8)
        rates.add(tuple(schedule.lr_lambdas[0](step) for step in range(8)))
    assert len(rates) == len(get_args(Schedule))


IDLE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"patience": 3}, {}),
    ({"validation_seeds": 2}, {}),
    ({}, {"holdout": warmth}),
    ({"hub_model_id": "me/mine"}, {}),
    ({"lr_warmup_steps": 0, "lr_scheduler": "constant_with_warmup"}, {}),
    ({"reward_ceiling": 0.9}, {}),
    ({"decoder": "madebyollin/taesd"}, {}),
]


@pytest.mark.parametrize(("settings", "given"), IDLE)
def test_what_cannot_act_is_refused_by_name(settings: Any, given: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter({**settings, **given}))}: expected .*got "):
        config = FinetuneConfig(**{"sampling": CALL, **settings})
        finetune(pipelines.stable_diffusion(), warmth, PROMPTS, DPO(), tmp_path, config, **given)


def test_a_clip_range_that_cannot_act_is_said() -> None:
    context = context_of(pipelines.stable_diffusion())
    with pytest.warns(UserWarning, match=r"^clip_range: has no effect with updates_per_round=1"):
        DDPO(clip_range=0.1).check(context, PROMPTS)
    with pytest.raises(ValueError, match=r"^deviation: expected 'group', got 'batch'"):
        DDPO(deviation="batch", images_per_prompt=1)


def test_what_the_caller_has_switched_changes_nothing(tmp_path: Path) -> None:
    def trained(name: str) -> list[float]:
        config = FinetuneConfig(**{**BASE, "max_train_steps": 1})
        pipe = pipelines.stable_diffusion()
        (line,) = finetune(pipe, warmth, PROMPTS, DRaFT(), tmp_path / name, config, progress=False).history
        return [line["loss"], line["grad_norm"]]

    expected = trained("plain")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert trained("switched") == expected
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    taught = r"^finetune: torch.inference_mode.*outside of that block"
    with torch.inference_mode(), pytest.raises(ValueError, match=taught):
        trained("inference")

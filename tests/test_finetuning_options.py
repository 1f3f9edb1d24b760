"""Every option of a training acts: with another value something else runs, or the value is refused."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pipelines
import pytest
import torch
from finetuned import CALL, PROMPTS, warmth

from aigiqa_reward.finetuning import ALGORITHMS, FinetuneConfig, finetune
from aigiqa_reward.finetuning.config import Schedule

BASE: dict[str, Any] = {"rank": 2, "train_batch_size": 4, "max_train_steps": 2, "learning_rate": 1e-2}
BASE |= {"checkpointing_steps": 1, "validation_seeds": 1, "sampling": {**CALL, "num_inference_steps": 2}}
WITH: dict[str, dict[str, Any]] = {
    "lr_warmup_steps": {"lr_scheduler": "linear"},
    "checkpoints_total_limit": {"max_train_steps": 4},
    "patience": {"max_train_steps": 4, "validation_steps": 1, "learning_rate": 100.0},
    "clip_range": {"updates_per_round": 2},
    "pairs_per_prompt": {"candidates": 4},
}
"""Other options with which an option acts."""

CONFIG: dict[str, Any] = {"rank": 3, "lora_alpha": 9.0, "target_modules": ("to_q",), "train_batch_size": 8, "seed": 1}
CONFIG |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "learning_rate": 1e-3, "ema_decay": 0.5}
CONFIG |= {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "max_train_steps": 3, "max_grad_norm": 1e-9}
CONFIG |= {"weight_decay": 0.5, "use_8bit_adam": True, "mixed_precision": "bf16", "kl_coeff": 5.0}
CONFIG |= {"reward_ceiling": -9.0, "checkpointing_steps": 2, "checkpoints_total_limit": 1, "validation_steps": 1}
CONFIG |= {"validation_seeds": 2, "patience": 1, "sampling": CALL, "push_to_hub": True, "hub_model_id": "me/mine"}
POLICY = {"images_per_prompt": 2, "updates_per_round": 2, "clip_range": 1e-9, "advantage_clip": 0.1}
POLICY |= {"deviation": "batch", "timestep_fraction": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "draft": {"truncation_steps": 2, "low_variance": 1},
    "refl": {"earliest": 0.0},
    "dpo": {"beta": 10.0, "loss": "ipo", "timesteps": "sampler", "refresh_every": 1, "candidates": 3, "margin": 9.0}
    | {"pairs_per_prompt": 2, "guidance_scales": (1.0, 3.0), "reward_guidance": 5.0},
    "ddpo": {**POLICY, "eta": 0.5},
    "grpo": {**POLICY, "sampler": "ancestral", "noise_level": 0.3, "timestep_fraction": 0.3},
}


def trace(folder: Path, name: str, **changes: Any) -> Any:
    """What a training runs and writes, or why it is refused."""
    kind: Any = ALGORITHMS[name]
    own = {field.name: changes.pop(field.name) for field in fields(kind) if field.name in changes}
    pipe = pipelines.stable_diffusion_3() if name == "grpo" else pipelines.stable_diffusion()
    calls: list[Any] = []
    denoiser: Any = pipe.transformer if name == "grpo" else pipe.unet
    denoiser.register_forward_hook(lambda module, _, out: calls.append((len(out[0]), module.training)))
    try:
        settings = {**BASE, **({"sampling": {**CALL, "num_inference_steps": 4}} if name == "grpo" else {}), **changes}
        config = FinetuneConfig(**settings)
        given = {"validation_prompts": ["a fox", "a cat"], "progress": False}
        result = finetune(pipe, warmth, PROMPTS[:2], kind(**own), folder, config, **given)
    except ValueError as error:
        return str(error)
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in result.history]
    for line in lines:
        line.get("validation", {}).pop("seconds", None)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    weights = hashlib.sha256((folder / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()
    return repr((calls, lines, sorted(files), weights, result.stopped))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.filterwarnings("ignore")
def test_an_option_acts_or_is_refused(name: str, tmp_path: Path) -> None:
    kind: Any = ALGORITHMS[name]
    changed = {**CONFIG, **OPTIONS[name]}
    assert set(changed) == {field.name for field in (*fields(FinetuneConfig), *fields(kind))} - {"pairs"}
    expected: dict[str, Any] = {}
    idle = []
    for place, (option, value) in enumerate(changed.items()):
        own = WITH.get(option, {})
        if str(own) not in expected:
            expected[str(own)] = trace(tmp_path / f"base {len(expected)}", name, **own)
            assert expected[str(own)].startswith("("), expected[str(own)]
        found = trace(tmp_path / str(place), name, **own, **{option: value})
        if found == expected[str(own)]:
            idle.append(option)
    assert not idle


def test_schedules_differ(tmp_path: Path) -> None:
    rates = []
    for place, schedule in enumerate(get_args(Schedule)):
        settings = {**BASE, "max_train_steps": 4, "sampling": {**CALL, "num_inference_steps": 1}}
        settings |= {"lr_scheduler": schedule, "lr_warmup_steps": int(schedule != "constant")}
        config = FinetuneConfig(**{**settings, "validation_seeds": 4, "train_batch_size": 1})
        result = finetune(
            pipelines.stable_diffusion(), warmth, PROMPTS, ALGORITHMS["refl"](), tmp_path / str(place), config,
            progress=False,
        )  # fmt: skip
        rates.append(tuple(line["learning_rate"] for line in result.history))
    assert len(set(rates)) == len(rates)


IDLE: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("refl", {"patience": 3}, {}, {}),
    ("refl", {"validation_seeds": 2}, {}, {}),
    ("refl", {}, {}, {"holdout": warmth}),
    ("refl", {"hub_model_id": "me/mine"}, {}, {}),
    ("refl", {"lr_warmup_steps": 0, "lr_scheduler": "constant_with_warmup"}, {}, {}),
    ("dpo", {"reward_ceiling": 0.9}, {}, {}),
    ("ddpo", {}, {"clip_range": 0.1}, {}),
    ("ddpo", {}, {"deviation": "batch", "images_per_prompt": 1}, {}),
]


@pytest.mark.parametrize(("name", "settings", "options", "given"), IDLE)
def test_what_cannot_act_is_refused_by_name(
    name: str, settings: dict[str, Any], options: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    first = next(iter({**settings, **options, **given}))
    with pytest.raises(ValueError, match=rf"^{first}: expected .*got "):
        config = FinetuneConfig(**{"sampling": CALL, **settings})
        finetune(pipelines.stable_diffusion(), warmth, PROMPTS, ALGORITHMS[name](**options), tmp_path, config, **given)


@pytest.mark.parametrize("mode", ["no gradients", "autocast", "inference"])
def test_what_the_caller_has_switched_changes_nothing(mode: str, tmp_path: Path) -> None:
    def trained(folder: Path) -> str:
        config = FinetuneConfig(**{**BASE, "validation_seeds": 4, "max_train_steps": 1})
        pipe, algorithm = pipelines.stable_diffusion(), ALGORITHMS["draft"]()
        result = finetune(pipe, warmth, PROMPTS, algorithm, folder, config, progress=False)
        return str([result.history[0][name] for name in ("loss", "grad_norm")])

    if mode == "inference":
        with torch.inference_mode(), pytest.raises(ValueError, match=r"^finetune: expected .*outside of that block"):
            trained(tmp_path / "a")
        return
    with torch.no_grad() if mode == "no gradients" else torch.autocast("cpu", torch.bfloat16):
        found = trained(tmp_path / "a")
        assert torch.is_grad_enabled() == (mode == "autocast") == torch.is_autocast_enabled("cpu")
    assert found == trained(tmp_path / "b")

"""The examples of fine-tuning and of prompt optimization, run with tiny models of the classes that they are for."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pipelines
import pytest
import torch
from commands import run
from safetensors.torch import load_file
from tiny_language_models import qwen_3, word_tokenizer

from aigiqa_reward import load_embedded_pipeline

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPTS = ["a red apple", "a blue car", "a penguin", "two frogs"]
WATCHED = ["a cat", "a dog"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


@pytest.mark.slow
def test_sdxl_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import finetune_sdxl_draft

    few = {"steps": 2, "rank": 2, "images": 2, "seeds": 1, "sampling_steps": 2, "guidance_scale": 2.0}
    pipe = pipelines.stable_diffusion_xl()
    result = finetune_sdxl_draft.main(PROMPTS, WATCHED, tmp_path, **few, pipe=pipe)
    assert (result.steps, result.folder) == (2, tmp_path)
    seen = {line["step"]: line["validation"] for line in result.history if "validation" in line}
    assert sorted(seen) == [0, 1, 2]
    printed = capsys.readouterr().out
    for name in ("reward", "holdout"):
        assert f"{name}: {seen[0][name]:.4f} before, {seen[result.kept_step][name]:.4f} after" in printed
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())["settings"]
    assert (state["batch"], state["draft.truncation_steps"], state["holdout_reward"]) == (2, 1, "auto")


@pytest.mark.slow
def test_sd15_dpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import finetune_sd15_dpo

    few = {"n": 2, "steps": 2, "sampling_steps": 2, "guidance_scale": 2.0, "margin": 0.0}
    result = finetune_sd15_dpo.main(PROMPTS, tmp_path, **few, pipe=pipelines.stable_diffusion())
    assert result.steps == 2
    printed = capsys.readouterr().out
    assert "3 pairs of 3 prompts" in printed
    accuracy = [line["accuracy"] for line in result.history if "accuracy" in line]
    assert accuracy[0] == 0.5, "before the first step both images gained nothing"
    assert f"1/2 before: {sum(accuracy) / 2:.3f} in the last steps" in printed
    assert len([*(tmp_path / "pairs" / "images").iterdir()]) == 6
    assert (tmp_path / "lora" / FILE).is_file()


def test_flux_grpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import finetune_flux_grpo

    few = {"steps": 2, "images_per_prompt": 2, "batch_size": 2, "accumulation": 1, "sampling_steps": 3, "side": 32}
    result = finetune_flux_grpo.main(PROMPTS, tmp_path, **few, pipe=pipelines.flux())
    rewards = [line["reward"] for line in result.history]
    assert f"{rewards[0]:.4f} in the first step, {rewards[1]:.4f} in the last" in capsys.readouterr().out
    assert any(bool(weight.any()) for name, weight in load_file(tmp_path / FILE).items() if "lora_B" in name)


@pytest.mark.slow
def test_the_sdxl_settings_for_the_command_line(tmp_path: Path) -> None:
    pipelines.stable_diffusion_xl().save_pretrained(tmp_path / "sdxl")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "watched.txt").write_text("\n".join(WATCHED))
    config = ["--config", EXAMPLES / "finetune_sdxl.yaml", "--pretrained_model_name_or_path", tmp_path / "sdxl"]
    texts = ["--prompts", tmp_path / "prompts.txt", "--validation_prompts", tmp_path / "watched.txt"]
    few = ["--num_inference_steps", "2", "--max_train_steps", "1", "--validation_seeds", "1", "--lr_warmup_steps", "0"]
    few += ["--gradient_accumulation_steps", "2"]
    more = ["--learning_rate", "0.01", "--output_dir", tmp_path / "lora", "--device", "cpu", "--dtype", "float32"]
    result = run("finetune", "draft", *config, *texts, *few, *more)
    assert result.exit_code == 0, result.output
    state = json.loads((tmp_path / "lora" / "checkpoint-1" / "state.json").read_text())["settings"]
    assert (state["rank"], state["batch"], state["mixed_precision"]) == (16, 2, "bf16")
    assert state["holdout_reward"] == "auto"
    assert list((tmp_path / "lora" / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_optimize_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="needs aigiqa-reward[trl]")
    import optimize_prompts_grpo as example

    tokenizer = word_tokenizer([*example.TASK.split(), *" ".join(PROMPTS).split(), "on", "white"])
    few = {"steps": 2, "rewrites": 2, "sampling_steps": 2, "guidance_scale": 1.0, "length": 3, "learning_rate": 0.01}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"pipe": load_embedded_pipeline(), "writer": qwen_3(tokenizer, layers=1), "tokenizer": tokenizer}
        rewards = example.main(PROMPTS[:2], tmp_path, **few, **models)
    assert len(rewards) == 2
    assert f"{rewards[0]:.4f} in the first step, {rewards[1]:.4f} in the last" in capsys.readouterr().out
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert any(bool(weight.abs().max() > 0) for name, weight in weights.items() if "lora_B" in name), "B starts at 0"


@pytest.mark.parametrize(
    "name", ["finetune_sdxl_draft", "finetune_sd15_dpo", "finetune_flux_grpo", "optimize_prompts_grpo"]
)
def test_each_is_short_and_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 80
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0
    assert f"python examples/{name}.py prompts.txt" in capsys.readouterr().out

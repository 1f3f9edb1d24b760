"""The example of prompt optimization, run as it stands with the embedded generator and a tiny language model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_language_models import qwen_3, word_tokenizer

from aigiqa_reward import load_embedded_pipeline

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPTS = ["a red apple", "a penguin"]

pytest.importorskip("trl", reason="needs aigiqa-reward[trl]")


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


@pytest.mark.slow
def test_it_trains_saves_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import optimize_prompts_grpo as example
    from safetensors.torch import load_file

    tokenizer = word_tokenizer([*example.TASK.split(), *" ".join(PROMPTS).split(), "on", "white"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rewards = example.main(
            PROMPTS,
            tmp_path,
            steps=2,
            rewrites=2,
            sampling_steps=2,
            guidance_scale=1.0,
            pipe=load_embedded_pipeline(),
            writer=qwen_3(tokenizer, layers=1),
            tokenizer=tokenizer,
            length=3,
            learning_rate=0.01,
        )
    assert len(rewards) == 2
    assert f"{rewards[0]:.4f} in the first step, {rewards[1]:.4f} in the last" in capsys.readouterr().out
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert any(bool(weight.abs().max() > 0) for name, weight in weights.items() if "lora_B" in name), "B starts at 0"


def test_it_is_short_and_explains_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = EXAMPLES / "optimize_prompts_grpo.py"
    assert len(file.read_text().splitlines()) <= 80
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0
    assert "python examples/optimize_prompts_grpo.py prompts.txt" in capsys.readouterr().out

"""A denoiser sharded over two processes, with LoRA that is whole in both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from finetuned import CALL, PROMPTS, warmth
from pipelines import FAMILIES
from safetensors.torch import load_file

from aigiqa_reward.finetuning import DRaFT, FinetuneConfig, finetune
from aigiqa_reward.finetuning.lora import FILE
from aigiqa_reward.finetuning.sharding import is_sharded, shard_denoiser
from aigiqa_reward.sampling.families import family_of


def colder(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return -warmth(images, prompts)


def train(pipe: Any, folder: Path, batch: int, **settings: Any) -> None:
    """Three steps with validations of three images, which two processes do not share evenly."""
    settings |= {"rank": 2, "train_batch_size": batch, "learning_rate": 1e-3, "max_train_steps": 3, "sampling": CALL}
    config = FinetuneConfig(**settings, validation_steps=3, validation_seeds=1)
    prompts = ["a fox", "a cat", "a dog"]
    finetune(pipe, warmth, PROMPTS, DRaFT(truncation_steps="all"), folder, config, prompts, colder, progress=False)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_that_share_a_denoiser_train_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, __file__, str(tmp_path)], env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("sd", "flux"):
        train(FAMILIES[name](), tmp_path / f"{name} alone", batch=2)
        shared, alone = (load_file(tmp_path / each / "checkpoint-3" / FILE) for each in (name, f"{name} alone"))
        assert max(float(weight.abs().max()) for key, weight in alone.items() if "lora_B" in key) > 1e-3
        torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)


def test_one_process_shares_with_none() -> None:
    with pytest.raises(ValueError, match=r"^fsdp: expected several processes, got one; .*torchrun"):
        shard_denoiser(FAMILIES["flux"]())


if __name__ == "__main__":  # a process of torchrun
    PartialState(cpu=True)
    for family in ("sd", "flux"):
        pipeline = FAMILIES[family]()
        shard_denoiser(pipeline)
        denoiser: Any = family_of(pipeline, need="the test").denoiser
        weights: list[Any] = list(denoiser.parameters())
        assert is_sharded(denoiser)
        assert sum(w.to_local().numel() for w in weights) < 0.6 * sum(w.numel() for w in weights)
        train(pipeline, Path(sys.argv[1]) / family, batch=1, gradient_checkpointing=family == "flux")

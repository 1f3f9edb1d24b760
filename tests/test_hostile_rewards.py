"""Saved rewards that were tampered with: refused with a clear error, nothing run, no excessive memory taken."""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import write_tiny_clip
from hostile import MEMORY, SECONDS, peak

from aigiqa_reward import Reward, create_reward
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
from aigiqa_reward.utils.weights import WeightsError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    clip = write_tiny_clip(folder / "clip", seed=0)
    create_reward("tsp_mgs", encoder=OpenCLIPConfig(architecture=f"local-dir:{clip}")).save_pretrained(
        folder / "reward"
    )
    return folder / "reward"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "reward")


def refused(folder: Path) -> str:
    spent, held = resource.getrusage(resource.RUSAGE_SELF).ru_utime, peak()
    with pytest.raises(WeightsError) as caught:
        create_reward("tsp_mgs", weights=folder)
    assert str(folder) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - spent < SECONDS
    assert peak() - held < MEMORY / 4
    return str(caught.value)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "run")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pickles_are_never_opened(copy: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    assert isinstance(create_reward("tsp_mgs", weights=copy), Reward)
    (copy / "model.safetensors").unlink()
    buffer = io.BytesIO()
    torch.save({"weight": Payload(mark)}, buffer)
    for data in (pickle.dumps(Payload(mark)), buffer.getvalue()):
        (copy / name).write_bytes(data)
        refused(copy)
        with pytest.raises(WeightsError, match=re.escape(name)):
            create_reward("tsp_mgs", weights=copy / name)
        assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload works, so that the test could fail"


CFG = ("model", "towers", "clip", "model_cfg")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((*CFG, "vision_cfg", "width"), 10**5),  # refused before memory is taken
        ((*CFG, "text_cfg", "vocab_size"), 10**10),
        (("model", "config", "adapter_rank"), 10**9),
        ((*CFG, "text_cfg", "hf_model_name"), "../../escaped"),
        ((*CFG, "vision_cfg", "timm_model_name"), "hf-hub:some/one"),
        (("name",), "../../escaped"),
        (("dtype",), "__class__"),
        (("quality_weight",), float("nan")),
        (("model",), None),
        ((*CFG, "vision_cfg", "patch_size"), 0),
    ],
)
def test_a_description_of_something_else_is_refused(
    copy: Path, place: tuple[str, ...], value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    node = config = json.loads((copy / "config.json").read_text())
    for name in place[:-1]:
        node = node[name]
    node[place[-1]] = value
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy)

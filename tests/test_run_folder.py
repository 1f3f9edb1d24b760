"""Which run a folder belongs to, what identifies its settings, and JSON without NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from PIL import Image
from torch import nn

from aigiqa_reward.utils.run_folder import (
    RunFolder,
    differences,
    identity,
    pipeline_identity,
    read_jsonl,
    reward_identity,
    to_json,
    weights_digest,
    write_json,
)


def folder(path: Path, **more: Any) -> RunFolder:
    return RunFolder(path, argument="out", contents=("*.png", "rows"), **more)


def test_a_run_resumes_its_own_folder_and_no_other(tmp_path: Path) -> None:
    run = folder(tmp_path / "new")
    assert run.settings() is None
    run.check({"seed": 1})
    assert not run.path.exists(), "a check writes nothing"
    run.begin({"seed": 1, "rate": math.nan})
    assert run.settings() == {"seed": 1, "rate": None}
    run.begin({"seed": 1, "rate": math.nan})
    with pytest.raises(
        ValueError, match=r"^out: .*new holds a run with other settings \(more: None there, 'x' now; seed"
    ):
        run.begin({"seed": 2, "rate": None, "more": "x"})
    run.begin({"seed": 2, "rate": None}, ignore=["seed"])
    assert run.settings() == {"seed": 2, "rate": None}


def test_overwriting_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.begin({"seed": 1})
    for name in ("a.png", "mine.txt"):
        (tmp_path / name).write_text(name)
    run.begin({"seed": 2}, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "mine.txt"}


@pytest.mark.parametrize(("name", "overwrite"), [("a.png", False), ("rows", True), ("run.json", True)])
def test_a_folder_that_no_run_wrote_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text("[1, 2]")
    with pytest.raises(ValueError, match=f"^out: .*{name}.*choose another folder"):
        folder(tmp_path).begin({}, overwrite=overwrite)
    assert (tmp_path / name).read_text() == "[1, 2]"
    with pytest.raises(ValueError, match=r"^out: expected a folder, got the file"):
        folder(tmp_path / name).settings()
    (tmp_path / "run.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"^out: cannot read .*run\.json"):
        folder(tmp_path).settings()


def test_settings_count_once_there_is_something_to_resume(tmp_path: Path) -> None:
    run = folder(tmp_path, started="checkpoint-*")
    run.begin({"seed": 1})
    run.begin({"seed": 2})
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="seed: 2 there, 3 now"):
        run.begin({"seed": 3})


def test_differences_are_named_and_shortened() -> None:
    before, now = {"a": 1, "b": [1, 2], "c": "x" * 500}, {"a": 1.0, "b": (1, 2), "c": "y" * 500, "d": 0}
    first, second = differences(before, now)
    assert (len(first) < 200, first[:4], second) == (True, "c: '", "d: None there, 0 now")
    assert differences(before, now, ignore=("c", "d")) == []


def test_json_has_no_nan_and_lines_may_be_cut_off(tmp_path: Path) -> None:
    value = {"a": [1.5, math.inf, (math.nan,)], "b": {"c": -math.inf}}
    write_json(tmp_path / "new" / "a.json", value)
    expected = {"a": [1.5, None, [None]], "b": {"c": None}}
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == json.loads(to_json(value)) == expected
    assert read_jsonl(b'{"a": 1}\n\n{"a": 2}\n{"a": ') == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError):
        read_jsonl(b'{"a": \n{"a": 2}\n')


def test_values_are_identified_by_their_content() -> None:
    array = np.arange(6.0).reshape(2, 3)
    values = [array, array + 1, torch.from_numpy(array + 2), Image.new("L", (2, 3)), Image.new("L", (2, 3), 1), array.T]
    values += [array.view(np.int64), torch.from_numpy(array + 2).float(), Image.new("P", (2, 3))]
    values += [other := Image.new("P", (2, 3)), np.array(["x", None]), np.array(["y", None])]
    other.putpalette([7, 8, 9])
    found = [str(identity(value)) for value in values]
    assert len(set(found)) == len(values)
    assert found == [str(identity(value.copy() if hasattr(value, "copy") else value.clone())) for value in values]
    assert identity({"a": (1, None, "x"), 3: object}) == {"a": [1, None, "x"], "3": "builtins.object"}


def test_a_reward_is_identified_by_every_bit_of_its_weights_and_its_shares() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    before = weights_digest(module)
    assert weights_digest(module) == before
    with torch.no_grad():
        module[0].weight.view(torch.int16)[1, 2] += 1
    changed = weights_digest(module)
    module.quality_weight = 0.3
    assert len({before, changed, weights_digest(module)}) == 3
    assert reward_identity(module).startswith("Sequential ")
    assert reward_identity(by_hand) == "by_hand"


def changed_components() -> dict[str, Callable[[Any], object]]:
    """What changes the images of a pipeline whose class, origin and scheduler stay the same, by the component."""

    checked = pipelines.stable_diffusion(safety_checker=True)

    def adapted(pipe: Any, scale: float = 2.0) -> None:
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), adapter_name="x")
        pipe.set_adapters(["x"], [scale])

    return {
        "vae": lambda pipe: pipe.register_modules(vae=pipelines.stable_diffusion_xl().vae),
        "vae scaling": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5),
        "text_encoder": lambda pipe: pipe.text_encoder.get_input_embeddings().weight.data[3, 4].neg_(),
        "tokenizer": lambda pipe: pipe.tokenizer.add_tokens(["<fox>"]),
        "scheduler": lambda pipe: pipe.scheduler.register_to_config(num_train_timesteps=900),
        "safety_checker": lambda pipe: pipe.register_modules(safety_checker=checked.safety_checker),
        "pipeline": lambda pipe: pipe.register_to_config(requires_safety_checker=True),
        "unet adapter": adapted,
        "unet adapter scale": lambda pipe: adapted(pipe, 1.0),
        "unet fused": lambda pipe: (adapted(pipe), pipe.fuse_lora(), pipe.unload_lora_weights()),
        "unet FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    }


def test_a_pipeline_is_identified_by_what_its_components_hold() -> None:
    before, seen = pipeline_identity(pipelines.stable_diffusion()), []
    assert before == pipeline_identity(pipelines.stable_diffusion())
    for name, change in changed_components().items():
        change(pipe := pipelines.stable_diffusion())
        now = pipeline_identity(pipe)
        assert [key for key in now if now[key] != before[key]] == [name.split()[0]], name
        seen.append(str(now))
    assert len(set(seen)) == len(seen)


def test_what_does_not_change_the_images_keeps_the_identity_of_a_pipeline(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    before = pipeline_identity(pipe)
    pipe.save_pretrained(tmp_path)
    assert pipeline_identity(type(pipe).from_pretrained(tmp_path)) == before
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="untrained")
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_v"]), adapter_name="disabled")
    pipe.set_adapters(["untrained"])
    assert pipeline_identity(pipe) == before
    pipe.register_modules(unet=torch.compile(pipe.unet))
    assert pipeline_identity(pipe) == before
    other = pipelines.stable_diffusion()
    cpu_offload(other.unet, torch.device("cpu"))
    assert all(weight.is_meta for weight in other.unet.parameters())
    assert pipeline_identity(other)["unet"] == before["unet"]


def by_hand(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean(dim=(1, 2, 3))

"""`--lora`: what of a file fits a pipeline is loaded, and what does not is reported."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import FAMILIES
from safetensors.torch import load_file, save_file
from transformers.integrations import peft as integrations

from aigiqa_reward.cli._console import CommandError
from aigiqa_reward.cli._pipelines import add_loras

LAYERS = re.compile(r"\b(to_q|to_v|q_proj)\b")
HALF = re.compile(r"(?<=\.0\.attn\.to_q\.)lora_A")
Files = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Files:
    wanted = Version(getattr(integrations, "MIN_PEFT_VERSION", "0"))

    @cache
    def write(family: str) -> Path:
        if family == "sd" and Version(version("peft")) < wanted:
            pytest.skip(f"transformers puts LoRA into its text encoders with peft {wanted} or later")
        pipe, folder = FAMILIES[family](), tmp_path_factory.mktemp(family)
        layers = {"unet" if hasattr(pipe, "unet") else "transformer": ["to_q", "to_v"]}
        layers |= {"text_encoder": ["q_proj"]} if family == "sd" else {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for place, names in layers.items():
                getattr(pipe, place).add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        states = {f"{place}_lora_layers": get_peft_model_state_dict(getattr(pipe, place)) for place in layers}
        type(pipe).save_lora_weights(folder, **states)
        return folder / "pytorch_lora_weights.safetensors"

    return write


def changed(file: Path, to: Path, name: Callable[[str], str]) -> tuple[Path, list[str]]:
    tensors = load_file(file)
    save_file({name(key): tensor for key, tensor in tensors.items()}, to)
    return to, sorted({name(key) for key in tensors} - tensors.keys())


def layers_of(pipe: Any) -> dict[str, torch.Tensor]:
    parts = [getattr(pipe, name, None) for name in ("unet", "transformer", "text_encoder")]
    adapted = [part for part in parts if getattr(part, "peft_config", None)]
    return {
        f"{place}.{key}": tensor
        for place, part in enumerate(adapted)
        for key, tensor in get_peft_model_state_dict(part, adapter_name=next(iter(part.peft_config))).items()
    }


EACH = [name if name == "flux" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("family", EACH)
def test_a_whole_lora_is_loaded_without_a_message(written, family, capsys):
    pipe, file = FAMILIES[family]().to(torch.bfloat16), written(family)
    capsys.readouterr()
    add_loras(pipe, [str(file)])
    assert capsys.readouterr() == ("", "")
    assert len(layers_of(pipe)) == len(load_file(file))


def test_the_names_of_kohya_fit(written, tmp_path, capsys):
    tensors = {key: tensor for key, tensor in load_file(written("sd")).items() if key.startswith("unet.")}
    other = {}
    for key, tensor in tensors.items():
        layer, factor = key.removeprefix("unet.").split(".lora_")
        name = f"lora_unet_{layer.replace('.', '_')}"
        other |= {f"{name}.lora_{'down' if factor[0] == 'A' else 'up'}.weight": tensor}
        other |= {f"{name}.alpha": torch.tensor(2.0)}
    save_file(other, tmp_path / "kohya.safetensors")
    pipe = FAMILIES["sd"]()
    add_loras(pipe, [str(tmp_path / "kohya.safetensors")])
    assert "warning" not in capsys.readouterr().err
    assert len(layers_of(pipe)) == len(tensors)


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("flux", ".to_v.", ".to_other."),
        pytest.param("sdxl", ".attn1.", ".attn7.", marks=pytest.mark.slow),
        pytest.param("sd", "text_encoder.", "text_encoder_3.", marks=pytest.mark.slow),
        pytest.param("sd3", "transformer.", "prior.", marks=pytest.mark.slow),
    ],
)
def test_what_does_not_fit_is_counted_and_named(written, family, old, new, tmp_path, capsys):
    file = written(family)
    names = sorted(load_file(file))  # both halves of a layer are neighbors
    having = [name for name in names if old in name]
    picked = having[: (len(having) + 2) // 4 * 2]
    assert 0 < len(picked) < len(names)
    rename = lambda key: key.replace(old, new) if key in picked else key  # noqa: E731
    mixed, strays = changed(file, tmp_path / "mixed.safetensors", rename)
    pipe, expected = FAMILIES[family](), FAMILIES[family]()
    capsys.readouterr()
    add_loras(pipe, [str(mixed)])
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"warning: --lora: {len(picked)} of {len(names)} matrices in ")
    assert f"fit nothing in {type(pipe).__name__}" in said
    shown = [name for name in strays if name in said]
    assert shown == strays[: len(shown)]
    assert len(shown) >= min(3, len(strays))
    assert (f"and {len(strays) - len(shown)} more" in said) == (len(strays) > len(shown))
    rest = {key: tensor for key, tensor in load_file(mixed).items() if key not in strays}
    expected.load_lora_weights(rest, adapter_name="other")
    loaded, alone = layers_of(pipe), layers_of(expected)
    assert loaded.keys() == alone.keys()
    assert all(torch.equal(loaded[name], alone[name]) for name in alone)


@pytest.mark.parametrize("family", EACH)
def test_nothing_that_fits_is_an_error(written, family, tmp_path, capsys):
    for rename in (lambda k: LAYERS.sub("other", k), lambda k: f"prior.{k}"):
        file, _ = changed(written(family), tmp_path / "x.safetensors", rename)
        pipe = FAMILIES[family]()
        capsys.readouterr()
        with pytest.raises(CommandError, match=rf"x\.safetensors .*{type(pipe).__name__}.*made for another model"):
            add_loras(pipe, [str(file)])
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, t: (k, torch.zeros(t.shape[0], t.shape[1] + 3)), "made for another model.*mismatch"),
        (lambda k, t: (k, torch.zeros_like(t)), "changes nothing in FluxPipeline"),
        (lambda k, t: ("a", torch.zeros(2)), "x.safetensors"),
        (lambda k, t: (HALF.sub("lora_C", k, 1), t), r"one half of \d+ layers.*lora_A"),
    ],
)
def test_what_changes_nothing_is_an_error(written, tmp_path, change, message):
    save_file(dict(change(*each) for each in load_file(written("flux")).items()), tmp_path / "x.safetensors")
    with pytest.raises(CommandError, match=message):
        add_loras(FAMILIES["flux"](), [str(tmp_path / "x.safetensors")])


def test_a_pickle_under_the_right_name_is_never_opened(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    with pytest.raises(CommandError, match=r"x\.safetensors is not a whole \.safetensors file"):
        add_loras(FAMILIES["flux"](), [str(tmp_path / "x.safetensors")])
    assert not (tmp_path / "mark").exists()


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "run")

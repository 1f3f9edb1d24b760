from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import write_tiny_clip
from huggingface_hub import ModelCard

from aigiqa_reward import Reward, create_reward, get_reward_spec, list_rewards
from aigiqa_reward.assistants import Assistants
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
from aigiqa_reward.rewards.build import SYSTEMS, load_embedded
from aigiqa_reward.utils.weights import ASSETS, WeightsError, sha256

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog"]


class Described:
    def describe(self, images: torch.Tensor) -> list[str]:
        return ["a picture"] * len(images)


@pytest.fixture(scope="module")
def mst() -> Reward:
    return create_reward("mst_clipiqa")


@pytest.fixture(scope="module")
def saved(mst: Reward, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    mst.save_pretrained(folder)
    return folder


def test_an_unknown_name_says_which_exist_and_which_was_meant():
    with pytest.raises(ValueError, match=r"'compct'; did you mean 'compact'\?.*compact, mst_clipiqa, tsp_mgs"):
        create_reward("compct")
    with pytest.raises(ValueError, match="'tsp_mgs'"):
        get_reward_spec("TSP-MGS")
    with pytest.raises(ValueError, match="no reward is called 7"):
        create_reward(7)  # type: ignore[arg-type]


ENCODER = OpenCLIPConfig(architecture="ViT-B-32")
FOLDER = Path("somewhere")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "compact", "preset": "paper"}, "embedded towers"),
    ({"name": "compact", "encoder": ENCODER}, "only tsp_mgs"),
    ({"name": "compact", "assistants": Assistants(captioner=Described())}, "compact reward has none"),
    ({"name": "compact", "dtype": torch.int8}, "floating-point"),
    ({"name": "compact", "revision": "main"}, "weights is None"),
    ({"name": "compact", "quality_weight": -1.0}, "quality_weight"),
    ({"name": "compact", "device": "cudaa"}, "device: cannot use 'cudaa' here.*'cpu'"),
    ({"name": "mst_clipiqa", "preset": "paper"}, "no trained head.*aigiqa-reward train mst_clipiqa --preset paper"),
    ({"name": "mst_clipiqa", "preset": "large"}, "'large'"),
    ({"name": "tsp_mgs", "weights": FOLDER, "zero_shot": True}, "neither preset, encoder nor prefix"),
    ({"name": "tsp_mgs", "scenario": "poster"}, "only cpa_iqa has scenarios"),
    ({"name": "cpa_iqa", "scenario": "postr"}, "none called 'postr'.*poster"),
    ({"name": "cpa_iqa", "preferences": "none.json"}, "cannot read.*none.json"),
    ({"name": "tsp_mgs", "encoder": ENCODER}, "random weights"),
    ({"name": "tsp_mgs", "encoder": ENCODER, "preset": "paper"}, "pass one of them"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_arguments_that_contradict_each_other_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        create_reward(**arguments)


def test_the_table_lists_the_embedded_files_within_their_budgets():
    assert list_rewards(embedded=True) == ["compact", *SYSTEMS]
    sizes = {}
    for name in list_rewards(embedded=True):
        spec = get_reward_spec(name)
        assert spec.name == name and spec.paper and "Apache-2.0" in spec.license
        assert {file: sha256(ASSETS / file) for file in spec.sha256} == spec.sha256
        sizes[name] = sum((ASSETS / file).stat().st_size for file in spec.sha256)
        tokenizer = (ASSETS / "towers" / "tokenizer.json").stat().st_size if name == "compact" else 0
        assert abs((sizes[name] + tokenizer) / 1e6 - spec.megabytes) < 1
    assert get_reward_spec("compact").megabytes <= 60
    assert sum((ASSETS / name / "model.safetensors").stat().st_size for name in SYSTEMS) <= 10e6


@pytest.mark.parametrize(
    ("name", "file"), [("compact", "towers/text.safetensors"), ("cpa_iqa", "cpa_iqa/model.safetensors")]
)
def test_an_altered_embedded_file_is_refused(name: str, file: str, tmp_path: Path):
    for folder in {"towers", name}:
        shutil.copytree(ASSETS / folder, tmp_path / folder)
    data = bytearray((tmp_path / file).read_bytes())
    data[-1] ^= 1
    (tmp_path / file).write_bytes(data)
    with pytest.raises(WeightsError, match=r"altered or damaged.*sha256.*reinstall"):
        load_embedded(name, folder=tmp_path)


def test_zero_shot_runs_on_the_compact_towers_too():
    state = torch.random.get_rng_state()
    untrained, trained = create_reward("tsp_mgs", zero_shot=True), create_reward("tsp_mgs")
    assert torch.equal(state, torch.random.get_rng_state()), "building draws nothing from the global generator"
    with torch.no_grad():
        first, second = (reward(IMAGES, PROMPTS) for reward in (untrained, trained))
    assert not torch.allclose(first.quality, second.quality, atol=1e-3)
    assert torch.equal(untrained.calibration.quality, torch.tensor([1.0, 0.0]))


def test_an_assistant_that_a_reward_was_trained_with_is_asked_for(tmp_path: Path):
    with pytest.warns(UserWarning, match="sc_agiqa's embedded head was trained with the offline substitutes"):
        described = create_reward("sc_agiqa", assistants=Assistants(captioner=Described()))
    described.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"trained with a captioner.*assistants=Assistants\(captioner=\.\.\.\)"):
        create_reward("sc_agiqa", weights=tmp_path)
    again = create_reward("sc_agiqa", weights=tmp_path, assistants=Assistants(captioner=Described()))
    with torch.no_grad():
        output = again(IMAGES, PROMPTS)
        assert torch.equal(output.total, described(IMAGES, PROMPTS).total)
    assert not output.details["substitute_description"].any()


def test_a_saved_reward_is_small_and_has_a_card_that_shows_how_to_load_it(mst: Reward, saved: Path, tmp_path: Path):
    embedded = sum((ASSETS / file).stat().st_size for file in mst.spec.sha256)
    assert (saved / "model.safetensors").stat().st_size < 1.1 * embedded
    card = ModelCard.load(saved / "README.md")
    assert card.data.to_dict()["library_name"] == "aigiqa-reward"
    assert all(text in card.text for text in (mst.spec.title, mst.spec.paper, mst.spec.scale))
    assert "PushToHub" not in card.text
    [call] = re.findall(r"create_reward\(.*\)", card.text)
    loaded = eval(call.replace('"..."', repr(str(saved))), {"create_reward": create_reward})
    assert loaded.name == "mst_clipiqa"
    (tmp_path / "README.md").write_text("mine")
    mst.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_is_no_saved_reward_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    monkeypatch.setenv("USERPROFILE", str(saved.parent))
    with pytest.raises(WeightsError, match=r"reward\.save_pretrained or a Hub id"):
        create_reward("compact", weights=tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(WeightsError, match=r"config\.json"):
        create_reward("compact", weights=tmp_path)
    with pytest.raises(WeightsError, match="'mst_clipiqa' reward, expected 'compact'"):
        create_reward("compact", weights=f"~/{saved.name}")
    with pytest.raises(ValueError, match="no revisions"):
        create_reward("mst_clipiqa", weights=saved, revision="main")
    with pytest.raises(TypeError, match="banana"):
        Reward.from_pretrained(saved, banana=1)  # type: ignore[call-arg]


def test_a_reward_on_another_clip_is_saved_with_its_towers(tmp_path: Path):
    clip = write_tiny_clip(tmp_path / "clip", seed=0)
    reward = create_reward("tsp_mgs", encoder=OpenCLIPConfig(architecture=f"local-dir:{clip}"), quality_weight=0.7)
    reward.save_pretrained(tmp_path / "saved")
    shutil.rmtree(clip)
    loaded = Reward.from_pretrained(tmp_path / "saved")
    assert loaded.quality_weight == 0.7
    assert Reward.from_pretrained(tmp_path / "saved", quality_weight=0.2).quality_weight == 0.2
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES, PROMPTS).total, reward(IMAGES, PROMPTS).total)

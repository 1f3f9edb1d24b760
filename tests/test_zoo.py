"""The zoo: names, arguments and weight files that people can get wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from clip_models import write_tiny_clip
from huggingface_hub import ModelCard

from aigiqa_reward import Reward, create_reward, list_rewards
from aigiqa_reward.assistants import Assistants
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
from aigiqa_reward.models.blocks import expected_level, level_probabilities
from aigiqa_reward.rewards.build import SYSTEMS, build_model
from aigiqa_reward.rewards.embedded import COMPACT_FILES, build_compact, load_embedded
from aigiqa_reward.rewards.specs import TOWER_FILES, get_spec
from aigiqa_reward.utils.weights import ASSETS, WeightsError, sha256


def test_an_unknown_name_says_which_exist_and_which_was_meant() -> None:
    with pytest.raises(ValueError, match=r"'compct'; did you mean 'compact'\?.*compact, mst_clipiqa, tsp_mgs"):
        create_reward("compct")
    with pytest.raises(ValueError, match="'tsp_mgs'"):
        create_reward("TSP-MGS")
    with pytest.raises(ValueError, match="no reward is called 7"):
        create_reward(7)  # type: ignore[arg-type]


class Described:
    """A captioner that says the same of everything."""

    def describe(self, images: torch.Tensor) -> list[str]:
        return ["a picture"] * len(images)


def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    encoder = OpenCLIPConfig(architecture="ViT-B-32")
    for arguments, message in (
        ({"name": "compact", "preset": "paper"}, "embedded towers"),
        ({"name": "compact", "preset": "large"}, "'large'"),
        ({"name": "compact", "encoder": encoder}, "embedded towers"),
        ({"name": "compact", "dtype": torch.int8}, "floating-point"),
        ({"name": "compact", "revision": "main"}, "weights is None"),
        ({"name": "compact", "quality_weight": -1.0}, "quality_weight"),
        ({"name": "compact", "quality_weight": 0.0, "correspondence_weight": 0.0}, "at least one above 0"),
        ({"name": "compact", "weights": tmp_path, "encoder": encoder}, "neither preset nor encoder"),
        ({"name": "compact", "zero_shot": True}, "embedded towers"),
        ({"name": "mst_clipiqa", "preset": "paper"}, "no trained head.*aigiqa-reward train mst_clipiqa --preset paper"),
        ({"name": "mst_clipiqa", "preset": "large"}, "'large'"),
        ({"name": "sc_agiqa", "encoder": encoder}, "only tsp_mgs"),
        ({"name": "sc_agiqa", "zero_shot": True}, "only tsp_mgs"),
        ({"name": "tsp_mgs", "weights": tmp_path, "zero_shot": True}, "neither preset nor encoder"),
        ({"name": "tsp_mgs", "scenario": "poster"}, "only cpa_iqa has scenarios"),
        ({"name": "cpa_iqa", "scenario": "postr"}, "none called 'postr'.*poster"),
        ({"name": "cpa_iqa", "preferences": tmp_path / "none.json"}, "cannot read.*none.json"),
        ({"name": "tsp_mgs", "encoder": encoder}, "random weights"),
        ({"name": "tsp_mgs", "encoder": encoder, "preset": "paper"}, "pass one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            create_reward(**arguments)


def test_embedded_files_are_the_ones_that_were_listed() -> None:
    spec = get_spec("compact")
    assert spec.sha256.keys() == COMPACT_FILES.keys()
    assert {file: sha256(ASSETS / file) for file in COMPACT_FILES} == spec.sha256
    total = (
        sum((ASSETS / file).stat().st_size for file in COMPACT_FILES)
        + (ASSETS / "towers" / "tokenizer.json").stat().st_size
    )
    assert total <= 40e6
    assert abs(total / 1e6 - spec.megabytes) < 1


def test_the_five_heads_are_listed_and_fit_their_budget() -> None:
    heads = 0
    for name in SYSTEMS:
        spec, file = get_spec(name), f"{name}/model.safetensors"
        assert spec.sha256.keys() == {*TOWER_FILES, file}
        assert {key: sha256(ASSETS / key) for key in spec.sha256} == spec.sha256
        total = sum((ASSETS / key).stat().st_size for key in spec.sha256)
        assert abs(total / 1e6 - spec.megabytes) < 1
        heads += (ASSETS / file).stat().st_size
    assert heads <= 10e6


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_an_altered_head_is_refused(name: str, tmp_path: Path) -> None:
    for folder in ("towers", name):
        shutil.copytree(ASSETS / folder, tmp_path / folder)
    damaged = tmp_path / name / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(WeightsError, match=r"altered or damaged.*sha256.*reinstall"):
        load_embedded(name, folder=tmp_path)


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    reward = create_reward("mst_clipiqa")
    reward.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["config"]["width"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"shape .*expected"):
        Reward.from_pretrained(tmp_path)


def test_zero_shot_runs_on_the_compact_towers_too() -> None:
    untrained, trained = create_reward("tsp_mgs", zero_shot=True), create_reward("tsp_mgs")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (reward(images, ["a cat", "a dog"]) for reward in (untrained, trained))
    assert not torch.allclose(first.quality, second.quality, atol=1e-3)
    assert torch.equal(untrained.calibration.quality, torch.tensor([1.0, 0.0]))


def test_an_assistant_that_a_reward_was_trained_with_is_asked_for(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="embedded head"):
        described = create_reward("sc_agiqa", assistants=Assistants(captioner=Described()))
    described.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"trained with a captioner.*assistants=Assistants\(captioner=\.\.\.\)"):
        create_reward("sc_agiqa", weights=tmp_path)
    again = create_reward("sc_agiqa", weights=tmp_path, assistants=Assistants(captioner=Described()))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = again(images, ["a cat", "a dog"])
        assert torch.equal(output.total, described(images, ["a cat", "a dog"]).total)
    assert not output.details["substitute_description"].any()


@pytest.mark.parametrize("file", sorted(COMPACT_FILES))
def test_an_altered_embedded_file_is_refused(file: str, tmp_path: Path) -> None:
    shutil.copytree(ASSETS, tmp_path / "assets")
    damaged = tmp_path / "assets" / file
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(WeightsError, match=r"altered or damaged.*sha256.*reinstall"):
        build_compact(tmp_path / "assets")


def test_saved_rewards_that_are_not_whole_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"reward\.save_pretrained or a Hub id"):
        create_reward("compact", weights=tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(WeightsError, match=r"config\.json"):
        create_reward("compact", weights=tmp_path)
    clip = write_tiny_clip(tmp_path / "clip", seed=0)
    saved = tmp_path / "saved"
    create_reward("tsp_mgs", encoder=OpenCLIPConfig(architecture=f"local-dir:{clip}")).save_pretrained(saved)
    with pytest.raises(WeightsError, match="'tsp_mgs' reward, expected 'compact'"):
        create_reward("compact", weights="~/saved")
    with pytest.raises(ValueError, match="no revisions"):
        create_reward("tsp_mgs", weights=saved, revision="main")
    config = json.loads((saved / "config.json").read_text())
    config["model"]["config"]["nonsense"] = 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="nonsense"):
        Reward.from_pretrained(saved)


def test_a_device_that_is_not_there_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"device: cannot use 'cudaa' here.*'cpu'"):
        create_reward("compact", device="cudaa")


def test_a_saved_reward_is_as_small_as_the_embedded_one(tmp_path: Path) -> None:
    reward = create_reward("mst_clipiqa")
    reward.save_pretrained(tmp_path)
    embedded = sum((ASSETS / file).stat().st_size for file in reward.spec.sha256)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * embedded
    saved, expected = Reward.from_pretrained(tmp_path).state_dict(), reward.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_a_saved_reward_has_a_card_of_its_own(tmp_path: Path) -> None:
    reward = create_reward("mst_clipiqa")
    reward.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict()["library_name"] == "aigiqa-reward"
    assert all(text in card.text for text in (reward.spec.title, reward.spec.paper, reward.spec.scale))
    assert "PushToHub" not in card.text
    [call] = re.findall(r"create_reward\(.*\)", card.text)
    loaded = eval(call.replace('"..."', repr(str(tmp_path))), {"create_reward": create_reward})
    assert loaded.name == "mst_clipiqa"
    (tmp_path / "README.md").write_text("mine")
    reward.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_from_pretrained_refuses_arguments_it_does_not_know(tmp_path: Path) -> None:
    create_reward("compact").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="banana"):
        Reward.from_pretrained(tmp_path, banana=1)


def test_create_reward_draws_nothing_from_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    create_reward("compact")
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_entry_names_its_paper_and_license() -> None:
    for spec in list_rewards():
        assert get_spec(spec.name) is spec
        assert spec.paper
        assert "Apache-2.0" in spec.license


def test_levels_follow_the_equations_of_the_paper() -> None:
    image = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    levels = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    got = level_probabilities(image, levels, 100.0)
    for row in range(3):
        cosines = [float(image[row] @ level / (image[row].norm() * level.norm())) for level in levels[row]]
        weights = torch.tensor([100 * cosine for cosine in cosines], dtype=torch.float64).exp()
        assert torch.allclose(got[row].double(), weights / weights.sum(), atol=1e-4)
    assert torch.allclose(expected_level(torch.eye(5)), torch.tensor([0.0, 1.25, 2.5, 3.75, 5.0]))


def test_an_assistant_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="tsp_mgs can use none, got captioner"):
        build_model("tsp_mgs", assistants=Assistants(captioner=Described()))


def test_a_context_that_prepare_did_not_return_is_refused() -> None:
    reward = create_reward("cpa_iqa")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a dog", "a bird"]
    with pytest.raises(ValueError, match=r"'regions' has shape \(1, 4, 8, 8\) for 3 images.*reward\.prepare"):
        reward(images, prompts, context={"regions": torch.ones(1, 4, 8, 8)})
    with pytest.raises(ValueError, match=r"expected some of regions, got \['captions'\]"):
        reward(images, prompts, context={"captions": torch.ones(3, 1)})
    with pytest.raises(TypeError, match=r"prepare\(images, prompts\) returned, got str"):
        reward(images, prompts, context="abc")  # type: ignore[arg-type]


def test_an_embedded_head_says_that_it_knows_no_assistant() -> None:
    with pytest.warns(UserWarning, match="sc_agiqa's embedded head was trained with the offline substitutes"):
        create_reward("sc_agiqa", assistants=Assistants(captioner=Described()))
    with pytest.raises(TypeError, match="expected Assistants"):
        create_reward("sc_agiqa", assistants={"captioner": Described()})  # type: ignore[arg-type]

from __future__ import annotations

import copy
import inspect
import itertools
import json
import subprocess
import sys
import tomllib
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_pack import DRAWN, PACK, WORKFLOWS, as_api, load_pack, read_workflow, workflow_faults
from torch import Tensor

from aigiqa_reward import RewardOutput, create_reward
from aigiqa_reward.report import WINNER
from aigiqa_reward.toy.degradations import blur
from aigiqa_reward.toy.pictures import compose
from aigiqa_reward.toy.world import caption

NODES = load_pack().NODE_CLASS_MAPPINGS
NAMES = ("AIGIQARewardLoader", "AIGIQAScore", "AIGIQASelectBest", "AIGIQAFilter", "AIGIQAContactSheet")
SUBJECT = (0, 0)
PROMPT = caption(*SUBJECT)


@pytest.fixture(autouse=True)
def _as_comfyui_runs_nodes() -> Iterator[None]:
    with torch.inference_mode():
        yield


def node(name: str) -> Any:
    return NODES[name]()


@pytest.fixture(scope="module")
def loaded() -> Any:
    with torch.inference_mode():
        return node("AIGIQARewardLoader").load("compact", device="cpu")[0]


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    sharp = compose(np.array([SUBJECT]), np.random.default_rng(0)).expand(5, -1, -1, -1)
    return blur(sharp, torch.tensor([0.5, 0.25, 0.0, 0.75, 1.0])).permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def expected(pictures: Tensor) -> RewardOutput:
    return create_reward("compact")(pictures.permute(0, 3, 1, 2), [PROMPT] * 5)


def brightness(images: Tensor, prompts: list[str] | None) -> Tensor:
    del prompts
    return images.mean(dim=(1, 2, 3))


def gray(*levels: float, height: int = 16, width: int = 20) -> Tensor:
    batch = torch.tensor(levels).view(-1, 1, 1, 1).repeat(1, height, width, 3)
    batch[:, 0, 0] = torch.rand(len(levels), 3, generator=torch.Generator().manual_seed(len(levels)))
    return batch


def select(images: list[Any], *, prompt: tuple[Any, ...] = ("a lamp",), top_k: int = 1, **more: Any) -> Any:
    return node("AIGIQASelectBest").select([more.pop("reward", brightness)], images, list(prompt), [top_k], **more)


def keep(images: list[Any], threshold: float, *, aspect: str = "total", if_none: str = "error", **more: Any) -> Any:
    reward, prompt = more.pop("reward", brightness), more.pop("prompt", ["a lamp"])
    return node("AIGIQAFilter").filter([reward], images, prompt, [threshold], [aspect], [if_none], **more)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_without_the_package_it_says_what_to_install(tmp_path):
    code = f"""
import importlib.util, sys
sys.modules["aigiqa_reward"] = None
specification = importlib.util.spec_from_file_location("pack", {str(PACK / "__init__.py")!r})
specification.loader.exec_module(importlib.util.module_from_spec(specification))
"""
    result = run(code, tmp_path)
    assert result.returncode == 1
    for text in (result.stderr.splitlines()[-1], (PACK / "README.md").read_text()):
        assert "python -m pip install ./aigiqa-reward" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_node_declares_what_its_function_takes(name):
    assert "comfy" not in sys.modules
    assert tuple(NODES) == NAMES == tuple(load_pack().NODE_DISPLAY_NAME_MAPPINGS)
    declared = NODES[name].INPUT_TYPES()
    required, optional = declared["required"], declared.get("optional", {})
    parameters = inspect.signature(getattr(NODES[name], NODES[name].FUNCTION)).parameters
    assert [*required, *optional] == [argument for argument in parameters if argument != "self"]
    assert all(parameters[argument].default is not inspect.Parameter.empty for argument in optional)
    for argument, (kind, settings) in (required | optional).items():
        assert settings["tooltip"].endswith("."), argument
        if isinstance(kind, list):
            assert settings["default"] in kind
        default = parameters[argument].default
        if not getattr(NODES[name], "INPUT_IS_LIST", False) and default not in (inspect.Parameter.empty, None):
            assert settings["default"] == default
    outputs = NODES[name].RETURN_TYPES
    for texts in (NODES[name].RETURN_NAMES, NODES[name].OUTPUT_TOOLTIPS):
        assert len(texts) == len(outputs)
    assert len(getattr(NODES[name], "OUTPUT_IS_LIST", outputs)) == len(outputs)
    assert NODES[name].CATEGORY == "AIGIQA" and NODES[name].DESCRIPTION


@pytest.mark.slow
def test_a_wheel_of_it_holds_all_and_imports_without_comfyui(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, which builds the pack, is not installed")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    result = run(build, PACK)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(tmp_path / result.stdout.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "aigiqa_reward_nodes"
    shipped = {path.relative_to(PACK) for path in [*PACK.glob("*.py"), *WORKFLOWS, *DRAWN]}
    assert {path.relative_to(package) for path in package.rglob("*") if path.is_file()} == shipped
    project = tomllib.loads((PACK / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == (PACK / "requirements.txt").read_text().split() == ["aigiqa-reward>=0.1.0"]
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "installed")!r}, {str(PACK.parents[1])!r}]
from importlib.metadata import entry_points
from aigiqa_reward_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
[entry] = entry_points(group="comfyui.custom_nodes")
print(*entry.load().NODE_CLASS_MAPPINGS, "comfy" in sys.modules, "diffusers" in sys.modules)
"""
    result = run(code, tmp_path)
    assert result.stdout.split() == [*NAMES, "False", "False"], result.stderr


def test_scores_are_the_rewards_own_and_quality_without_a_prompt(loaded, pictures, expected):
    totals, report, heat = node("AIGIQAScore").score(loaded, pictures, PROMPT, "off")
    assert heat is None  # outside ComfyUI; within it an ExecutionBlocker
    rows = json.loads(report)
    assert totals == pytest.approx(expected.total.tolist(), abs=1e-5) == [row["total"] for row in rows]
    for aspect in ("quality", "correspondence"):
        assert [row[aspect] for row in rows] == pytest.approx(getattr(expected, aspect).tolist(), abs=1e-5)
    assert rows[0]["details"]["uncertainty"] == pytest.approx(float(expected.details["uncertainty"][0]), abs=1e-5)
    assert [(row["index"], row["prompt"], row["heat_map"]) for row in rows] == [(i, PROMPT, None) for i in range(5)]
    [alone], report, _ = node("AIGIQAScore").score(loaded, pictures[2:3], " \n", "off")
    assert alone == pytest.approx(float(expected.quality[2]), abs=1e-5)
    assert json.loads(report)[0]["correspondence"] is json.loads(report)[0]["prompt"] is None


def test_heat_maps_are_distortions_where_a_reward_has_them_else_gradients(loaded, pictures):
    cpa = node("AIGIQARewardLoader").load("cpa_iqa", device="cpu")[0]
    _, report, heat = node("AIGIQAScore").score(cpa, pictures[:1, :40], PROMPT)
    assert json.loads(report)[0]["heat_map"] == "distortion"
    assert heat.shape == (1, 40, 64, 3) and heat.std() > 0.01
    _, report, heat = node("AIGIQAScore").score(loaded, pictures[2:3], PROMPT)
    assert [row["heat_map"] for row in json.loads(report)] == ["gradient"]
    assert heat.shape == (1, 64, 64, 3)
    assert heat.min() >= 0 and heat.max() <= 1
    spread = (heat - 0.4 * pictures[2:3].mean(dim=-1, keepdim=True)).flatten(0, 2).std(dim=0)
    assert spread.min() > 0.01  # colors over the gray image, and not one color


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (lambda images, prompts: images.detach().mean(dim=(1, 2, 3)), "no gradient passes"),
        (lambda images, prompts: torch.from_numpy(images.numpy().mean(axis=(1, 2, 3))), "numpy"),
    ],
)
def test_a_reward_without_gradients_is_scored_without_a_heat_map(reward, reason):
    images = gray(0.5, 0.7)
    totals, report, heat = node("AIGIQAScore").score(reward, images, PROMPT)
    assert totals == pytest.approx(images.mean(dim=(1, 2, 3)).tolist(), abs=1e-6)
    assert heat is None
    for row in json.loads(report):
        assert row["heat_map"] is None and reason in row["heat_map_error"]
    with pytest.raises((ValueError, RuntimeError), match=reason):
        node("AIGIQAScore").score(reward, images, PROMPT, "gradient")
    with pytest.raises(ValueError, match="gives no distortion maps"):
        node("AIGIQAScore").score(reward, images, PROMPT, "distortion")


@pytest.mark.parametrize(
    ("images", "prompt", "error", "message"),
    [
        ({"samples": torch.zeros(1, 4, 8, 8)}, "x", TypeError, "expected an IMAGE.*got dict; decode latents first"),
        (torch.zeros(1, 3, 16, 16), "x", ValueError, r"expected an IMAGE \(B, H, W, 3\), got shape \(1, 3, 16, 16\)"),
        (torch.zeros(0, 16, 16, 3), "x", ValueError, "at least one image, got none"),
        (torch.zeros(1, 16, 16, 3), ["x"], TypeError, "prompt: expected a text, got list"),
    ],
)
def test_wrong_inputs_are_refused_by_name(images, prompt, error, message):
    with pytest.raises(error, match=message):
        node("AIGIQAScore").score(brightness, images, prompt)
    with pytest.raises(TypeError, match=r"reward: expected the output of Load Reward \(AIGIQA\), got str"):
        node("AIGIQAScore").score("compact", gray(0.5))


@pytest.mark.parametrize(("top_k", "order"), [(2, [1, 3]), (9, [1, 3, 2, 0, 4]), (0, [1, 3, 2, 0, 4])])
def test_top_k_is_one_limit_and_0_is_none(top_k, order):
    with pytest.raises(ValueError, match="top_k: expected one value, got a list of 2"):
        node("AIGIQASelectBest").select([brightness], [gray(0.5)], ["x"], [top_k, 2])
    images = gray(0.3, 0.9, 0.5, 0.9, 0.1)
    images[3] = images[1]  # a tie goes to the earlier
    [ranked], _, scores, indices = select([images], top_k=top_k)
    assert (indices, scores) == (order, sorted(scores, reverse=True))
    assert torch.equal(ranked, images[order])


def test_images_of_several_sizes_compete_and_come_out_as_a_list():
    wide, tall = gray(0.1, 0.8), gray(0.9, height=30, width=17)
    given = [{"samples": torch.zeros(2, 4, 2, 2)}, {"samples": torch.ones(1, 4, 3, 2)}]
    ranked, latents, _, indices = select([wide, tall], top_k=2, latent=given)
    assert indices == [2, 1]
    assert torch.equal(ranked[0], tall) and torch.equal(ranked[1], wide[1:])
    assert torch.equal(latents[0]["samples"], given[1]["samples"])
    assert [latent["batch_index"] for latent in latents] == [[0], [1]]


def test_with_a_prompt_for_each_batch_each_has_its_winner():
    first, second = gray(0.1, 0.2), gray(0.6, 0.5, 0.4)
    [winners], *_ = select([first, second], prompt=("a", "b"))
    assert torch.equal(winners, torch.stack([first[1], second[0]]))
    with pytest.raises(ValueError, match="one for each of the 2 image batches, got 3 prompts"):
        select([first, second], prompt=("a", "b", "c"))


def test_a_broken_image_is_never_chosen_and_the_console_names_it(caplog):
    images = gray(0.9, 0.2, 0.5)
    images[0, 3, 3] = torch.inf
    for _ in range(2):  # each time anew, where Python's own warnings come once
        caplog.clear()
        [ranked], *_ = select([images], top_k=0)
        assert torch.equal(ranked, images[[2, 1]])
        assert all(part in caplog.text for part in ("1 of 3 candidates were dropped", "image 0", "--fp32-vae"))


def test_a_batch_without_a_sound_image_leaves_the_others_theirs(caplog):
    nothing, sound = torch.full((2, 16, 20, 3), torch.nan), gray(0.2, 0.6)
    [winner], *_ = select([nothing, sound], prompt=("a", "b"))
    assert torch.equal(winner, sound[1:])
    assert "none of the 2 candidates could be ranked" in caplog.text
    [kept], *_ = keep([nothing, sound], 0.5, prompt=["a", "b"])
    assert torch.equal(kept, sound[1:])
    with pytest.raises(ValueError, match=r"images: none of the 2 .*NaN or infinite.*; none of the 2 "):
        select([nothing, nothing], prompt=("a", "b"))
    assert keep([nothing], 0.5, aspect="correspondence", if_none="stop") == (None,) * 4
    for otherwise in ("error", "best"):
        with pytest.raises(ValueError, match=r"images: none of the 2 candidates could be ranked.*--fp32-vae"):
            keep([nothing], 0.5, if_none=otherwise)


@pytest.mark.parametrize("value", [255, -1])
def test_values_out_of_range_are_explained_in_words_of_comfyui(value, caplog):
    images = gray(0.1, 0.9)
    images[1, 2, 2] = value
    with pytest.raises(ValueError, match=r"image 1: .*got \[.*an IMAGE holds values in \[0, 1\]") as caught:
        node("AIGIQAScore").score(brightness, images)
    assert select([images], top_k=0)[3] == [0]
    assert "an IMAGE holds values in [0, 1]" in caplog.text
    for text in (str(caught.value), caplog.text):
        assert not any(word in text for word in ("validate", "from_vae", "255)", "mean and a deviation"))


IMAGES = gray(0.3, 0.9, 0.5)
SAMPLES = torch.arange(3 * 4 * 2 * 2, dtype=torch.float32).view(3, 4, 2, 2)
MASKS = torch.arange(3 * 8 * 8, dtype=torch.float32).view(3, 1, 8, 8)


def test_latents_are_chosen_with_their_masks_and_noise():
    given = {"samples": SAMPLES, "noise_mask": MASKS, "batch_index": [7, 5, 6], "type": "x"}
    before = copy.deepcopy(given)
    _, [latent], _, _ = select([IMAGES], top_k=2, latent=[given])
    assert torch.equal(latent["samples"], SAMPLES[[1, 2]]) and torch.equal(latent["noise_mask"], MASKS[[1, 2]])
    assert (latent["batch_index"], latent["type"]) == ([5, 6], "x")
    assert given.keys() == before.keys() and torch.equal(given["samples"], before["samples"])
    latent["samples"][:] = 0  # what a later node writes into does not reach the input
    assert torch.equal(given["samples"], before["samples"])


@pytest.mark.parametrize(("masks", "rows"), [(MASKS[:1], [0, 0]), (MASKS[:2], [1, 0])])
def test_fewer_masks_than_latents_are_repeated_as_samplers_do(masks, rows):
    _, [latent], *_ = select([IMAGES], top_k=2, latent=[{"samples": SAMPLES, "noise_mask": masks}])
    assert torch.equal(latent["noise_mask"], masks[rows]) and latent["batch_index"] == [1, 2]


@pytest.mark.parametrize(("shape", "same"), [((4, 64, 66), True), ((4, 65, 65), False), ((16, 65, 65), True)])
def test_a_selected_latent_draws_the_noise_of_its_row_where_that_is_a_multiple_of_16_numbers(shape, same):
    at_once = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(1, *shape, generator=one_by_one) for _ in range(3)])
    _, [latent], _, indices = select([IMAGES], top_k=0, latent=[{"samples": at_once}])
    assert latent["batch_index"] == indices == [1, 2, 0]
    assert torch.equal(rows[latent["batch_index"]], latent["samples"]) is same
    _, [again], _, _ = select([IMAGES], top_k=0, latent=[{"samples": rows, "batch_index": [0, 1, 2]}])
    assert torch.equal(rows[again["batch_index"]], again["samples"]), "drawn row by row before, at any size"


@pytest.mark.parametrize(
    ("latent", "error", "message"),
    [
        ({"samples": SAMPLES[:2]}, ValueError, "a row for each of the 3 images, got 2"),
        ({"noise_mask": MASKS}, TypeError, "expected a LATENT.*got dict"),
        ({"samples": SAMPLES, "batch_index": [0, 1]}, ValueError, "a batch_index with .* of its 3 rows, got 2"),
        (
            {"samples": torch.zeros(1, 16, 3, 2, 2)},
            ValueError,
            "got 1; .*a video's LATENT is one row for all its frames",
        ),
    ],
)
def test_latents_that_do_not_fit_are_refused(latent, error, message):
    with pytest.raises(error, match=f"latent: .*{message}"):
        select([IMAGES], latent=[latent])


def test_what_scores_enough_passes_in_its_order():
    with pytest.raises(ValueError, match="aspect: correspondence needs a prompt"):
        keep([gray(0.5)], 0.1, aspect="correspondence", prompt=[""])
    images = gray(0.3, 0.9, 0.5, 0.6)
    levels = images.mean(dim=(1, 2, 3)).tolist()
    latent = {"samples": torch.arange(4.0).view(4, 1, 1, 1)}
    [kept], [rows], scores, indices = keep([images], levels[2] - 1e-6, latent=[latent])
    assert rows["samples"].flatten().tolist() == indices == [1, 2, 3]
    assert torch.equal(kept, images[indices])
    assert scores == pytest.approx(levels[1:], abs=1e-6)


@pytest.mark.parametrize(("aspect", "passing"), [("total", [2]), ("quality", [0]), ("correspondence", [1])])
def test_the_aspect_says_which_score_is_compared_to_the_threshold(aspect, passing):
    def reward(images: Tensor, prompts: list[str]) -> RewardOutput:
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return RewardOutput(total=blue, quality=red, correspondence=green)

    images = torch.zeros(3, 16, 16, 3)
    for place in range(3):
        images[place, ..., place] = 1
    assert keep([images], 0.5, aspect=aspect, reward=reward)[3] == passing


def test_where_none_passes_it_fails_by_how_much_or_passes_the_best_or_nothing():
    images = gray(0.3, 0.9, 0.5)
    with pytest.raises(ValueError, match=rf"the best total is {images[1].mean():.3f}, below 0\.990; lower"):
        keep([images], 0.99)
    images[2] = torch.nan
    [kept], *_ = keep([images], 0.99, if_none="best")
    assert torch.equal(kept, images[1:2])
    assert keep([images], 0.99, if_none="stop") == (None,) * 4


def test_a_sheet_shows_the_best_in_a_frame():
    [sheet] = node("AIGIQAContactSheet").draw([brightness], [gray(0.2, 0.9), gray(0.4, height=30)], ["three lamps"])[0]
    framed = (sheet[0] == torch.tensor(WINNER) / 255).all(dim=-1)
    assert framed.any()
    inside = sheet[0][framed.any(dim=1)][:, framed.any(dim=0)]
    assert (inside - 0.9).abs().lt(0.01).all(dim=-1).float().mean() > 0.3  # the bright one is what it frames


def test_a_sheet_shows_a_tile_for_each_image_that_has_no_score():
    draw = node("AIGIQAContactSheet").draw
    broken = torch.full((2, 16, 20, 3), torch.nan)
    [one], [two], [beyond] = (
        draw([brightness], [images], ["a lamp"])[0] for images in (broken[:1], broken, gray(9.0, 9.0))
    )
    assert two.shape[2] > one.shape[2]
    assert two.shape == beyond.shape and not torch.equal(two, beyond), "what differs is the reason"
    assert len(draw([brightness], [gray(0.2), gray(0.4)], ["a", ""])[0]) == 2, "a sheet for each prompt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device: expected one of auto, cpu"),
        ({"dtype": "int8"}, "dtype: expected a floating-point"),
        ({"weights": '"/no/such/folder"'}, "weights: expected a folder.*got '/no/such/folder'"),
    ],
)
def test_a_loader_that_cannot_load_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        node("AIGIQARewardLoader").load(**({"name": "compact"} | arguments))


def test_weights_that_were_written_again_are_loaded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    changed = NODES["AIGIQARewardLoader"].IS_CHANGED
    assert changed() == changed(weights=None) == changed(name="compact", weights="someone/on-the-hub") == ""
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = changed(weights=str(tmp_path))
    for written in (f" {tmp_path} ", f'"{tmp_path}"', f"'{tmp_path}'", "~"):
        assert before == changed(weights=written) != "", written
    (tmp_path / "config.json").write_bytes(b"{}")
    assert changed(weights=str(tmp_path)) != before


class Interrupted(Exception):
    """As comfy.model_management.InterruptProcessingException."""


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    found: Any = types.ModuleType("comfy.model_management")
    found.stop, found.emptied = False, []

    def throw_exception_if_processing_interrupted() -> None:
        if found.stop:
            raise Interrupted

    found.get_torch_device = found.unet_offload_device = lambda: torch.device("cpu")
    found.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    found.soft_empty_cache = lambda: found.emptied.append(1)
    comfy: Any = types.ModuleType("comfy")
    comfy.model_management = found
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.model_management", found)
    return found


def test_cancel_stops_before_the_next_batch_and_leaves_the_reward_as_it_was(manager, pictures, expected):
    loaded = node("AIGIQARewardLoader").load("compact", keep_loaded=False, correspondence_weight=0.0)[0]
    manager.stop = True
    with pytest.raises(Interrupted):
        node("AIGIQAScore").score(loaded, pictures[:1], PROMPT, "off")
    assert not loaded.reward._forward_pre_hooks
    assert len(manager.emptied) == 1
    manager.stop = False
    [total], *_ = node("AIGIQAScore").score(loaded, pictures[:1], PROMPT, "off")
    assert len(manager.emptied) == 2
    assert total == pytest.approx(float(expected.quality[0]), abs=1e-5)  # the shares of the total reach the reward
    loaded.keep_loaded = True
    node("AIGIQAScore").score(loaded, pictures[:1], PROMPT, "off")
    assert len(manager.emptied) == 2


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_holds_declared_nodes_inputs_and_links(path):
    workflow = read_workflow(path)
    assert workflow_faults(workflow, NODES) == []
    assert {node["class_type"] for node in workflow.values()} & set(NAMES)
    assert {node["class_type"] for path in WORKFLOWS for node in read_workflow(path).values()} > set(NAMES)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_drawn_workflow_is_the_same_one(path):
    drawn, workflow = read_workflow(path.parents[1] / path.name), read_workflow(path)
    ours = as_api(drawn)
    for place, entry in ours.items():
        if entry["class_type"] in NAMES:  # the front end writes out optional inputs too
            entry["inputs"] = {name: entry["inputs"][name] for name in workflow[place]["inputs"]}
    assert ours == workflow
    boxes = [(*node["pos"], *node["size"]) for node in drawn["nodes"]]
    for (x, y, wide, high), (x2, y2, wide2, high2) in itertools.combinations(boxes, 2):
        assert x + wide <= x2 or x2 + wide2 <= x or y + high <= y2 or y2 + high2 <= y, "one node covers another"

"""Published rewards in all that takes a reward: commands, best of N, fine-tuning, reports, ComfyUI, trl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from aigiqa_reward_trl import RewriteReward
from comfyui_pack import load_pack
from commands import lines, only_error, run
from finetuned import CALL, PROMPTS
from pipelines import FEW_STEPS
from safetensors.torch import load_file
from test_model_contract import scenes
from tiny_published import DESCRIPTIONS, tiny_published, write_pickscore

from aigiqa_reward import BestOfN, CompositeReward, Reward, Scorer, create_reward
from aigiqa_reward.finetuning import DRaFT, FinetuneConfig, finetune
from aigiqa_reward.finetuning.context import create_context
from aigiqa_reward.finetuning.lora import FILE
from aigiqa_reward.finetuning.results import ValidationResult
from aigiqa_reward.finetuning.validation import default_holdout
from aigiqa_reward.images import to_pil
from aigiqa_reward.report import contact_sheet, heat_maps, write_page
from aigiqa_reward.rewards import verify
from aigiqa_reward.rewards.published import PUBLISHED
from aigiqa_reward.sampling import PromptScorer

FAST = ("pickscore", "imagereward")
ASPECTS = {"quality", "correspondence"}


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in DESCRIPTIONS]
)
def reward(request: pytest.FixtureRequest) -> Reward:
    return tiny_published(request.param)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pickscore(tmp_path / "pickscore")


def cached_pickscore(cache: Path) -> None:
    source = PUBLISHED["pickscore"]
    write_pickscore(cache / f"models--{source.repo.replace('/', '--')}" / "snapshots" / str(source.revision))


def test_best_of_n_and_its_reports_name_only_what_is_judged(reward: Reward, tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    output = BestOfN(pipe, reward, n=3, top_k=2)(PROMPTS[0], seed=0, **FEW_STEPS)
    assert output.scores == sorted(output.all_scores, reverse=True)[:2]
    judged = {aspect for aspect in ASPECTS if getattr(output, aspect) is not None}
    assert judged == ASPECTS & {reward.spec.judges}
    assert contact_sheet(output, PROMPTS[0]).size[0] > 0
    heat = heat_maps(reward, scenes(1, 48, 40), PROMPTS[:1])
    assert (heat.kind, float(heat.maps.max())) == ("gradient", 1.0)
    page = write_page([(PROMPTS[0], output)], tmp_path / "page.html").read_text()
    assert {aspect for aspect in ASPECTS if aspect in page} == judged
    scorer = PromptScorer(pipe, reward, **FEW_STEPS)
    found = RewriteReward(scorer)([""] * 2, ["a red fox", ""], original=list(PROMPTS[:2]))
    assert found == [scorer.score(["a red fox"], [PROMPTS[0]])[0].total, 0.0]


def test_a_step_of_draft_reaches_the_lora_and_validations_leave_out_what_is_not_judged(reward, cache, tmp_path):
    cached_pickscore(cache)
    sampling = {**CALL, "num_inference_steps": 1}
    config = FinetuneConfig(max_train_steps=1, train_batch_size=2, rank=2, validation_seeds=1, sampling=sampling)
    arguments: dict[str, Any] = {"validation_prompts": ["a fox"], "progress": False}
    pipe = pipelines.stable_diffusion()
    result = finetune(pipe, reward, PROMPTS, DRaFT(truncation_steps=1), tmp_path, config, **arguments)
    step = next(line for line in result.history if "loss" in line)
    assert step["grad_norm"] > 0
    trained = load_file(tmp_path / "checkpoint-1" / FILE)
    assert any(bool(tensor.any()) for name, tensor in trained.items() if "lora_B" in name)
    found = ValidationResult.read(tmp_path / "validation", 1).summary()
    assert {"reward", "holdout"} <= found.keys()
    assert ASPECTS & {*found, *step} == ASPECTS & {reward.spec.judges}
    assert (tmp_path / "curves.png").is_file()
    state = json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())
    held = "auto" if PUBLISHED[reward.name].family == "CLIP" else "pickscore"  # what a resumed training must have
    assert state["settings"]["holdout_reward"] == held


def test_only_one_embedded_reward_has_a_ceiling(tmp_path: Path) -> None:
    embedded, own = create_reward("compact"), tiny_published("pickscore")
    config, ceilings = FinetuneConfig(max_train_steps=1, sampling=CALL), []
    for trained in (embedded, own, CompositeReward({"a": embedded, "b": own})):
        ceilings.append(create_context(pipelines.stable_diffusion(), trained, config, tmp_path, None).ceiling)
    assert ceilings == [1.0, None, None]


@pytest.mark.slow
def test_a_published_reward_is_validated_by_one_of_another_family_if_its_weights_are_here(cache: Path) -> None:
    blip, clip = tiny_published("imagereward"), tiny_published("clipscore")
    assert default_holdout(blip).name == "compact"
    cached_pickscore(cache)
    held = default_holdout(blip)
    images = scenes(1, 48, 40)
    assert torch.equal(held(images, PROMPTS[:1]).total, tiny_published("pickscore")(images, PROMPTS[:1]).total)
    compact = create_reward("compact")
    mixed = CompositeReward({"hpsv2.1": blip, "compact": compact})
    found = [default_holdout(trained).name for trained in (mixed, clip, compact)]
    assert found == ["pickscore", "compact", "mst_clipiqa"]


def test_commands_take_a_local_copy(folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for image, file in zip(to_pil(scenes(2, 48, 40)), files, strict=True):
        image.save(file)
    own = ["--reward", "pickscore", "--weights", folder, "--device", "cpu"]
    expected = Scorer(create_reward("pickscore", weights=folder)).score(files, PROMPTS[0]).total.tolist()
    for command in ("score", "rank"):
        rows = lines(run(command, *files, *own, "--prompt", PROMPTS[0], "--format", "jsonl").stdout)
        assert [row["total"] for row in rows] == (expected if command == "score" else sorted(expected, reverse=True))
        assert {row["quality"] for row in rows} == {None}
    assert only_error(run("score", *files, *own, "--reward", "compact")).startswith("error: --weights: belongs to one")
    embedded = ["--model", "embedded", "--prompt", "a penguin", "--num-inference-steps", "1", *own, "--output-dir"]
    result = run("best-of-n", *embedded, tmp_path / "best", "--n", "2")
    assert result.exit_code == 0, result.output
    rows = lines((tmp_path / "best" / "results.jsonl").read_text())
    assert [row["correspondence"] for row in rows] == [None, None]


@pytest.mark.slow
def test_finetune_takes_a_local_copy(folder: Path, tmp_path: Path) -> None:
    common = ["finetune", "draft", "--model", "embedded", "--prompt", "a penguin", "--num-inference-steps", "1"]
    common += ["--max-train-steps", "1", "--train-batch-size", "1", "--device", "cpu", "--output-dir", tmp_path / "out"]
    result = run(*common, "--reward", "pickscore", "--weights", folder)
    assert result.exit_code == 0, result.output


def test_without_a_network_a_mixture_names_the_file_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = only_error(run("score", __file__, "--prompt", "x", "--reward", "pickscore:1.0", "--reward", "hpsv2.1:0.5"))
    assert "PickScore_v1/resolve" in error
    assert "--weights FOLDER" in error


def test_verify_prints_scores_beside_the_reference_or_the_line_to_add(
    folder: Path, monkeypatch, tmp_path: Path
) -> None:
    table = tmp_path / "reference.json"
    monkeypatch.setattr(verify, "REFERENCE", table)
    table.write_text("{}")
    command = ["rewards", "--verify", "pickscore", "--weights", folder]
    images = [verify.ASSETS / "verify" / image for image in verify.IMAGES]
    raw = Scorer(create_reward("pickscore", weights=folder)).score(images, verify.PROMPT).details["raw"].tolist()
    first = run(*command)
    assert first.exit_code == 0, first.output
    entry = first.stdout.splitlines()[-1]
    table.write_text(f"{{{entry}}}")
    assert json.loads(table.read_text())["pickscore"]["raw"] == pytest.approx(raw, abs=1e-6)
    again = run(*command)
    assert (again.exit_code, again.stdout.count(f"{raw[0]:.6f}")) == (0, 2), again.output
    table.write_text(f"{{{entry.replace(str(round(raw[0], 6)), '1.0')}}}")
    assert (run(*command).exit_code, "does not score" in run(*command).stderr) == (1, True)
    table.write_text(f"{{{entry.replace(entry[25:35], '0' * 10)}}}")  # of other weights
    assert run(*command).stdout == first.stdout
    assert "expected a published reward" in only_error(run("rewards", "--verify", "compact"))
    assert "--verify, which is missing" in only_error(run("rewards", "--weights", folder))
    (folder / "model.safetensors").write_bytes(b"half")
    assert "not a whole safetensors file" in only_error(run(*command))


def test_comfyui_loads_and_scores_a_local_copy(folder: Path) -> None:
    nodes = load_pack().NODE_CLASS_MAPPINGS
    loaded = nodes["AIGIQARewardLoader"]().load("pickscore", device="cpu", weights=str(folder))[0]
    images = scenes(2, 48, 40).permute(0, 2, 3, 1)
    scores, report, _ = nodes["AIGIQAScore"]().score(loaded, images, PROMPTS[0])
    assert scores == create_reward("pickscore", weights=folder)(scenes(2, 48, 40), PROMPTS[:1] * 2).total.tolist()
    assert [(row["quality"], row["correspondence"]) for row in json.loads(report)] == [(None, None)] * 2
    chosen = {"reward": [loaded], "images": [images], "prompt": PROMPTS[:1], "threshold": [0.0], "if_none": ["best"]}
    assert len(nodes["AIGIQAFilter"]().filter(**chosen, aspect=["total"])[2]) >= 1
    with pytest.raises(ValueError, match="aspect: quality needs a reward that gives it; choose total"):
        nodes["AIGIQAFilter"]().filter(**chosen, aspect=["quality"])
    with pytest.raises(ValueError, match="needs one prompt per image"):
        nodes["AIGIQAScore"]().score(loaded, images, "")

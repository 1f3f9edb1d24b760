"""Scripts that print figures: the documentation shows what they print, and their commands run.

Scripts that train embedded assets, for hours or on data outside of the package, only print their help here.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from commands import run

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
EMBEDDED = EXAMPLES / "finetune_embedded"


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run_script(name: str, *arguments: str) -> str:
        script = EXAMPLES / name
        monkeypatch.syspath_prepend(script.parent)
        before = set(sys.modules)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            for module in set(sys.modules) - before:  # scripts of different folders have modules of the same name
                if Path(getattr(sys.modules[module], "__file__", None) or "").is_relative_to(EXAMPLES):
                    del sys.modules[module]
        return capsys.readouterr().out

    return run_script


def missing(printed: str, page: str) -> list[str]:
    shown = {line.lstrip("# ") for line in (ROOT / "docs" / page).read_text().splitlines()}
    return [line for line in printed.splitlines() if line.lstrip("# ") not in shown]


def test_the_tables_of_the_five_systems_are_those_of_their_reports(printed) -> None:
    out = printed("train_systems/table.py")
    assert out.count("\n|") > 50
    assert missing(out, "figures/systems.md") == []
    assert missing(out.replace("0.787", "0.788", 1), "figures/systems.md") != []


@pytest.mark.slow
def test_the_tables_of_the_compact_reward_are_those_of_its_predictions(printed) -> None:
    out = printed("train_compact/evaluate.py")
    assert out.count("\n|") > 10
    assert missing(out, "figures/compact.md") == []


@pytest.mark.slow
def test_the_reward_can_be_checked_on_the_world(printed) -> None:
    out = printed("train_compact/evaluate_world.py", "--pictures", "8")
    assert "held-out" in out


@pytest.mark.slow
def test_the_generator_can_be_checked(printed) -> None:
    out = printed("train_generator/evaluate.py", "--samples", "8")
    found = re.search(r"noun ([\d.]+), color ([\d.]+)", out)
    assert found and min(map(float, found.groups())) >= 0.75, out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft", "refl", "ddpo", "dpo", "nft"])
def test_the_recipes_on_the_embedded_pipeline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "watched.txt").write_text("a crab on a green background\n")
    few = ["--train_batch_size", "2", "--max_train_steps", "1", "--validation_seeds", "1"]
    few += ["--validation_prompts", tmp_path / "watched.txt", "--output_dir", tmp_path / name]
    if name in ("ddpo", "nft"):
        few += ["--images_per_prompt", "2"]
    if name == "dpo":
        (tmp_path / "prompts.txt").write_text("a penguin on a red background\na crab on a blue background\n")
        few += ["--prompts", tmp_path / "prompts.txt", "--candidates", "4"]
    result = run("finetune", name.partition("-")[0], "--config", EMBEDDED / f"{name}.yaml", *few)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
    assert {0, 1} <= {line["step"] for line in lines}
    assert (tmp_path / name / "pytorch_lora_weights.safetensors").is_file()


TRAININGS = [f"train_compact/{name}.py" for name in ("align", "train", "quality", "match")]
TRAININGS += [f"train_generator/{name}.py" for name in ("autoencoder", "denoiser", "judge")] + [
    "train_systems/train.py"
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_of_what_is_embedded_says_what_it_needs(name: str, printed, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        printed(name, "--help")
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out

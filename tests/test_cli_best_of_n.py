"""`aigiqa-reward best-of-n`: the folder that it fills, what it says, refuses and survives."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import lines, only_error, run
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from finetune_commands import refused
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import Result

from aigiqa_reward import BestOfN, load_embedded_pipeline
from aigiqa_reward.toy.pipeline import GENERATOR

PROMPT = "a red apple on a blue background"
HOSTILE = "<img src=x onerror=alert(1)>\"'& ../../x"
BEST_OF_N = ["best-of-n", "--model", "embedded"]
FEW = ["--num-inference-steps", "2", "--guidance-scale", "1", "--n", "3", "--batch-size", "3"]
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, folder = load_embedded_pipeline(), tmp_path_factory.mktemp("lora")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return lines((folder / "results.jsonl").read_text())


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_it_is_best_of_n_of_each_prompt(tiny, tiny_reward, tmp_path):
    arguments = [*BEST_OF_N, "--prompt", PROMPT, "--prompt", HOSTILE, *FEW, *tiny, "--output-dir", tmp_path]
    more = ["--top-k", "2", "--seed", "7", "--set", "eta=0.5", "--negative-prompt", "blurry"]
    result = run(*arguments, *more)
    assert result.exit_code == 0, result.output
    search = BestOfN(load_embedded_pipeline(), tiny_reward, n=3, batch_size=3, top_k=2, progress=False)
    winners = set()
    rows, page = rows_of(tmp_path), (tmp_path / "index.html").read_text()
    for index, prompt in enumerate((PROMPT, HOSTILE)):
        expected = search(prompt, seed=7, eta=0.5, negative_prompt="blurry", **SETTINGS)
        mine = [row for row in rows if row["prompt_index"] == index]
        assert [(row["seed"], row["prompt"]) for row in mine] == [(seed, prompt) for seed in (7, 8, 9)]
        assert [row["total"] for row in mine] == pytest.approx(expected.all_scores, abs=1e-6)
        for seed, image in zip(expected.seeds, expected.images, strict=True):
            name = f"images/{index:05d}_seed{seed}.png"
            winners.add(name)
            assert np.array_equal(np.asarray(Image.open(tmp_path / name)), np.asarray(image))
            assert str(tmp_path / name) in result.stdout
        winners |= {f"thumbnails/{index:05d}_seed{seed}.png" for seed in {7, 8, 9} - {*expected.seeds}}
    records = {f"prompts/{i:05d}.json" for i in range(2)} | {f"contact-sheets/{i:05d}.png" for i in range(2)}
    assert names(tmp_path) == winners | records | {"index.html", "results.jsonl", "settings.json"}
    assert page.count("<article") == 2
    assert HOSTILE not in page
    assert all(text in result.stderr for text in (str(tmp_path), "index.html", "results.jsonl", "knows nothing"))


def test_pruning_shows_its_curves_and_a_reward_its_maps(tmp_path):
    arguments = [*BEST_OF_N, "--prompt", PROMPT, "--num-inference-steps", "4", "--n", "6", "--pruning", "halving"]
    result = run(*arguments, "--diverse", "--reward", "cpa_iqa", "--device", "cpu", "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "index.html").read_text()
    assert page.count('class="curve') >= 4
    assert page.count('alt="Map: ') == 12
    assert json.loads((tmp_path / "settings.json").read_text())["pipe_kwargs"]["guidance_scale"] == 3.0


def test_zero_order_takes_prompts_from_a_file(tiny, tmp_path):
    (tmp_path / "p.txt").write_text(f"\ufeff{PROMPT}\r\n\n  \na penguin\u2028on ice\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": PROMPT, "x": 1}) + "\n\n" + '{"prompt": "a\\nb"}')
    for name, second in (("p.txt", "a penguin\u2028on ice"), ("p.jsonl", "a\nb")):
        out = tmp_path / name.replace(".", "-")
        arguments = ["--prompts", tmp_path / name, "--search", "zero_order", "--n", "1", "--num-inference-steps", "1"]
        result = run(*BEST_OF_N, *arguments, *tiny, "--output-dir", out)
        assert result.exit_code == 0, result.output
        assert [row["prompt"] for row in rows_of(out)] == [PROMPT, second]
        assert ("2 blank lines" in result.stderr) == (name == "p.txt")
        assert (out / "noises" / "00001.safetensors").is_file()


def test_loras_are_loaded_and_scaled(lora, tiny, tiny_reward, tmp_path):
    moved = shutil.copy(lora, tmp_path / "lora.safetensors")
    arguments = ["best-of-n", "--model", GENERATOR, "--prompt", PROMPT, *FEW, *tiny, "--output-dir", tmp_path / "out"]
    arguments += ["--lora", f"{lora.parent}:0.5", "--lora", f"{moved}:0.25"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    pipe = load_embedded_pipeline()
    for name in ("one", "other"):
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name=name)
    pipe.set_adapters(["one", "other"], adapter_weights=[0.5, 0.25])
    expected = BestOfN(pipe, tiny_reward, n=3, batch_size=3, progress=False)(PROMPT, **SETTINGS)
    assert [row["total"] for row in rows_of(tmp_path / "out")] == pytest.approx(expected.all_scores, abs=1e-6)
    save_file({name: 2 * tensor for name, tensor in load_file(lora).items()}, moved)
    assert re.search("lora: .* there, .* now", refused(run(*arguments)))


def test_a_rerun_resumes_and_refuses_other_settings(tiny, tmp_path):
    def sheets() -> dict[str, tuple[int, bytes]]:
        return {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in (tmp_path / "contact-sheets").iterdir()}

    def fill(*prompts: str, more: tuple[str, ...] = ()) -> Result:
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        return run(*BEST_OF_N, *asked, *FEW, *tiny, "--output-dir", tmp_path, *more)

    assert fill(PROMPT, HOSTILE).exit_code == 0
    first, rows = sheets(), rows_of(tmp_path)
    (tmp_path / "index.html").unlink()
    assert fill(PROMPT, HOSTILE, "a penguin").exit_code == 0
    longer = sheets()
    assert {name: longer[name] for name in first} == first, "a rerun draws only what is new"
    assert rows_of(tmp_path)[: len(rows)] == rows
    (tmp_path / "contact-sheets" / "00000.png").unlink()
    (winner,) = (tmp_path / "images").glob("00001_*")
    winner.unlink()
    again = fill(PROMPT, HOSTILE, "a penguin")  # one is missing, one's prompt is sampled again
    assert again.stdout.count("images/0") == (tmp_path / "index.html").read_text().count("<article") == 3
    assert [name for name, drawn in sheets().items() if drawn == longer[name]] == ["00002.png"]
    assert {name: drawn for name, (_, drawn) in sheets().items()} == {n: drawn for n, (_, drawn) in longer.items()}
    error = only_error(fill(PROMPT, more=("--seed", "5", "--reward-prompt", "two cats")))
    assert "--output-dir:" in error
    assert all(text in error for text in ("seed: 0 there, 5 now", "reward_prompt: None there, 'two cats' now"))
    assert "choose another folder, or clear this one" in error
    assert fill("a penguin", more=("--overwrite",)).exit_code == 0
    assert {name: drawn for name, (_, drawn) in sheets().items()} == {"00000.png": longer["00002.png"][1]}


def test_a_prompt_that_fails_gives_status_1(tiny, tmp_path):
    arguments = ["3" if word == "1" else word for word in FEW]
    more = ["--prompt", PROMPT, "--prompt", "x", "--set", "guidance_rescale=text", "--output-dir", tmp_path]
    result = run(*BEST_OF_N, *arguments, *tiny, *more)
    assert result.exit_code == 1
    assert f"error: prompt 0 ('{PROMPT}'): TypeError" in result.stderr
    assert "error: prompt 1 ('x'): " in result.stderr
    assert [row["seed"] for row in rows_of(tmp_path)] == [None, None]


def test_an_interruption_keeps_what_was_made(tiny, tmp_path, monkeypatch):
    step, count = DDIMScheduler.step, iter(range(100))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(DDIMScheduler, "step", interrupted)
    arguments = [*BEST_OF_N, "--prompt", PROMPT, "--n", "5", "--batch-size", "1", "--num-inference-steps", "1", *tiny]
    result = run(*arguments, "--output-dir", tmp_path)
    assert result.exit_code == 130
    assert result.stderr.endswith("error: interrupted: 0 of 1 prompts are finished; the same command resumes\n")
    rows = rows_of(tmp_path)
    assert [(row["seed"], row["finished"]) for row in rows] == [(0, False), (1, False)]
    best = max(rows, key=lambda row: row["total"])["seed"]
    assert [file.name for file in (tmp_path / "images").iterdir()] == [f"00000_seed{best}.png"]
    assert "interrupted: 2 of 5 candidates" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected one of them, got none"),
        ("--prompt x --prompts p.txt", "expected one of them, got both"),
        ("--prompts none.txt", "--prompts: cannot read none.txt: No such file"),
        ("--prompts blank.txt", "--prompts: blank.txt holds no prompt"),
        ("--prompts bad.jsonl", "bad.jsonl, line 1: expected"),
        ("--prompt x --n 2 --top-k 3", "at most --n 2"),
        ("--prompt x --seed -1", "--seed: expected an integer from 0"),
        (f"--prompt x --seed {2**64 - 15}", f"2.64 - N = {2**64 - 16}"),
        ("--prompt x --model embeded", "--model: .*did you mean embedded"),
        ("--prompt x --model models/my-sdd", "--model: .*did you mean models/my-sd"),
        ("--prompt x --model models", "no model_index.json"),
        ("--prompt x --model sd/model.safetensors", r"\.from_single_file\('sd/model.safetensors'\)\.save_pretrained\("),
        ("--prompt x --output-dir mine", "--output-dir: .*index.html exists and is not of an earlier run"),
        ("--prompt x --num-inference-steps 2 --set num_inference_steps=3", "is given by --num-inference-steps already"),
        ("--prompt x --set seed=3", "--set: seed is not a further argument"),
        ("--prompt x --set latents=1 TINY", "latents: BestOfN sets this"),
        ("--prompt x --set et=1 TINY", "et: StableDiffusionPipeline has no such argument"),
        ("--prompt x --pruning halving --search zero_order TINY", "pass one of them"),
        ("--prompt x --offload TINY", "--offload: needs a device beside the CPU"),
        ("--prompt x --lora p.txt TINY", "--lora: expected a .safetensors file"),
    ],
)
def test_usage_errors(tiny, tmp_path, arguments, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "models" / "my-sd").mkdir(parents=True)
    files = {"p.txt": "x", "blank.txt": "\n \n", "bad.jsonl": '{"text": 3}', "mine/index.html": "x"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    meant = {"TINY": tiny, "x": ["a penguin on a green background"]}  # the embedded generator warns of other prompts
    full = [part for argument in arguments.split() for part in meant.get(argument, [argument])]
    start = ["best-of-n"] if "--model" in full else BEST_OF_N
    assert re.search(message, only_error(run(*start, *full, cwd=tmp_path)))
    assert names(tmp_path) == files.keys()


def test_pickled_weights_are_never_opened(tiny, tmp_path):
    pickled = shutil.copytree(GENERATOR, tmp_path / "pickled")
    for file in pickled.rglob("*.safetensors"):
        name = "pytorch_model" if file.stem == "model" else file.stem  # transformers' name, or diffusers'
        torch.save(load_file(file), file.with_name(f"{name}.bin"))
        file.unlink()
    error = only_error(run("best-of-n", "--model", pickled, "--prompt", "x", *tiny, "--output-dir", tmp_path / "out"))
    assert "--model: cannot load the pipeline" in error
    assert "safetensors" in error
    assert not (tmp_path / "out").exists()

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breaking import Breaking
from commands import ENVIRONMENT, lines
from diffusers import DDIMScheduler
from hostile import png_that_claims
from PIL import Image

from aigiqa_reward import BestOfN, create_reward, load_embedded_pipeline
from aigiqa_reward.images import read_prompt
from aigiqa_reward.sampling import BestOfEachError, best_of_each
from aigiqa_reward.sampling.batch_run import ResultsFolder

PROMPTS = ["a red apple on a blue background", "a penguin on a red background", "../../a 'rocket' on <green>"]
SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
KEYS = ["seed", "prompt", "total", "quality", "correspondence", "error", "prompt_index", "rank", "image", "pruned"]
KEYS += ["finished"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_embedded_pipeline()


class Redness(Breaking):
    def __init__(self, fails_on: str = "", error: type[BaseException] = RuntimeError) -> None:
        super().__init__("redness", redness, fails_on, error)


def redness(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 2, :16].mean(dim=(1, 2))


def searching(pipe: Any, reward: Any, **arguments: Any) -> BestOfN:
    return BestOfN(pipe, reward, progress=False, **{"n": 3, "top_k": 2, "batch_size": 3} | arguments)


def fill(search: BestOfN, out: Path, prompts: list[str] = PROMPTS, **more: Any) -> ResultsFolder:
    return best_of_each(search, prompts, out, progress=False, **SETTINGS, **more)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_each_prompt_gives_what_best_of_n_gives_alone(pipe: Any, tmp_path: Path) -> None:
    search = searching(pipe, create_reward("compact"))
    results = list(fill(search, tmp_path, PROMPTS[:2], seed=5))
    rows = lines((tmp_path / "results.jsonl").read_text())
    assert all(list(row) == KEYS for row in rows)
    assert [(row["prompt_index"], row["seed"]) for row in rows] == [(i, s) for i in range(2) for s in (5, 6, 7)]
    for result, prompt in zip(results, PROMPTS[:2], strict=True):
        alone = search(prompt, seed=5, **SETTINGS)
        assert result.prompt == prompt
        assert result.finished
        assert result.output.seeds == alone.seeds
        assert result.output.all_seeds == alone.all_seeds
        for name in ("scores", "quality", "correspondence", "all_scores", "all_quality", "all_correspondence"):
            assert getattr(result.output, name) == pytest.approx(getattr(alone, name), abs=1e-6)
        for image, expected, seed in zip(result.output.images, alone.images, alone.seeds, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(expected))
            (row,) = [row for row in rows if (row["prompt"], row["seed"]) == (prompt, seed)]
            assert row["rank"] == alone.seeds.index(seed) + 1
            assert np.array_equal(np.asarray(Image.open(tmp_path / row["image"])), np.asarray(expected))
            written = read_prompt(tmp_path / row["image"])
            assert written is not None
            assert written.text == prompt
    assert all((row["image"] is None) == (row["rank"] is None) for row in rows)


@pytest.mark.parametrize(("keep", "folder"), [("thumbnails", "thumbnails"), ("all", "images")])
def test_the_other_images_are_kept_where_they_are_asked_for(pipe: Any, tmp_path: Path, keep: str, folder: str) -> None:
    every = searching(pipe, Redness(), top_k=3)(PROMPTS[0], **SETTINGS)
    images = dict(zip(every.winners, every.images, strict=True))
    (result,) = fill(searching(pipe, Redness(), top_k=1, keep=keep), tmp_path, PROMPTS[:1])
    assert list(result.output.others) == sorted(every.winners[1:])
    for number, image in result.output.others.items():
        assert np.array_equal(np.asarray(image), np.asarray(images[number]))
        assert (tmp_path / folder / f"00000_seed{number}.png").is_file()
    rows = lines((tmp_path / "results.jsonl").read_text())
    assert sum(row["image"] is not None for row in rows) == {"thumbnails": 1, "all": 3}[keep]


@pytest.mark.parametrize("plan", [{"pruning": "halving"}, {"search": "zero_order"}])
def test_a_search_is_read_back_as_it_was(pipe: Any, tmp_path: Path, plan: dict[str, Any]) -> None:
    search = searching(pipe, Redness(), n=5, top_k=1, batch_size=5, **plan)
    (result,) = fill(search, tmp_path, PROMPTS[:1])
    alone = search(PROMPTS[0], **SETTINGS)
    assert result.output.previews == alone.previews
    assert result.output.denoiser_calls == alone.denoiser_calls
    pruned = [row["seed"] for row in lines((tmp_path / "results.jsonl").read_text()) if row["pruned"]]
    assert pruned == [s for s, total in zip(alone.all_seeds, alone.all_scores, strict=True) if np.isnan(total)]
    assert bool(pruned) == ("pruning" in plan)
    assert (result.output.seeds, result.output.winners) == (alone.seeds, alone.winners)
    assert (result.output.noises is None) == (alone.noises is None)
    if alone.noises is not None:
        assert torch.equal(result.output.noises[0], alone.noises[0])


def test_files_are_named_by_numbers_and_stay_in_the_folder(pipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    hostile = ["../../../etc/x", "/tmp/y\x00", "COM1: \u202e %s {}", "a\nb"]
    fill(searching(pipe, Redness(), n=1, top_k=1), out, hostile)
    names = {f"prompts/{i:05d}.json" for i in range(4)} | {f"images/{i:05d}_seed0.png" for i in range(4)}
    assert set(contents(out)) == names | {"results.jsonl", "settings.json"}
    assert {file.name for file in tmp_path.iterdir()} == {"a"}
    assert [row["prompt"] for row in lines((out / "results.jsonl").read_text())] == hostile


def test_an_interrupted_run_is_resumed(pipe: Any, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    fill(searching(pipe, Redness()), whole)
    with pytest.raises(KeyboardInterrupt) as caught:
        fill(searching(pipe, Redness(PROMPTS[2], KeyboardInterrupt)), out)
    assert "2 of 3 prompts are finished" in caught.value.__notes__[0]
    rows = lines((whole / "results.jsonl").read_text())
    assert lines((out / "results.jsonl").read_text()) == [row for row in rows if row["prompt_index"] < 2]
    again = Redness()
    fill(searching(pipe, again), out)
    assert set(again.prompts) == {PROMPTS[2]}
    assert contents(out) == contents(whole)
    again.prompts.clear()
    fill(searching(pipe, again, batch_size=1), out)
    assert again.prompts == []
    assert contents(out) == contents(whole)
    fill(searching(pipe, again), out, [*PROMPTS, "one more"])
    assert set(again.prompts) == {"one more"}


def test_a_prompt_that_fails_is_named_and_the_others_are_sampled(pipe: Any, tmp_path: Path) -> None:
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    with pytest.raises(BestOfEachError, match=r"1 of 3 prompts failed: prompt 1 .*red apple.*RuntimeError: broken"):
        fill(searching(pipe, Redness(PROMPTS[0])), tmp_path, prompts)
    rows = lines((tmp_path / "results.jsonl").read_text())
    assert [row["prompt_index"] for row in rows] == [0, 0, 0, 1, 2, 2, 2]
    assert rows[3]["error"] == "RuntimeError: broken"
    assert rows[3]["seed"] is None
    assert [row["finished"] for row in rows] == [True] * 3 + [False] + [True] * 3
    healed = Redness()
    fill(searching(pipe, healed), tmp_path, prompts)
    assert set(healed.prompts) == {PROMPTS[0]}
    assert all(row["error"] is None for row in lines((tmp_path / "results.jsonl").read_text()))


@pytest.mark.parametrize("damage", ["image", '{"prompt": ', "[]"])
def test_a_damaged_prompt_is_sampled_again(pipe: Any, tmp_path: Path, damage: str) -> None:
    fill(searching(pipe, Redness()), tmp_path)
    before = contents(tmp_path)
    if damage == "image":
        next((tmp_path / "images").glob("00001_*")).unlink()
    else:
        (tmp_path / "prompts" / "00001.json").write_text(damage)
    again = Redness()
    fill(searching(pipe, again), tmp_path)
    assert set(again.prompts) == {PROMPTS[1]}
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("file", ["images/00000_seed0.png", "noises/00000.safetensors"])
@pytest.mark.parametrize("data", [png_that_claims(60_000, 60_000), png_that_claims(12_000, 12_000), b"{}", None])
def test_results_that_cannot_be_read_count_as_none(pipe: Any, tmp_path: Path, file: str, data: bytes | None) -> None:
    results = fill(searching(pipe, Redness(), n=1, top_k=1, search="zero_order"), tmp_path, PROMPTS[:1])
    assert [result.index for result in results] == [0]
    (tmp_path / file).unlink()
    if data is None:
        (tmp_path / file).symlink_to("/dev/zero")
    else:
        (tmp_path / file).write_bytes(data)
    assert list(results) == []


def test_other_settings_are_refused_with_the_differences(pipe: Any, tmp_path: Path) -> None:
    fill(searching(pipe, Redness()), tmp_path, PROMPTS[:2], settings={"lora": None})
    before = contents(tmp_path)
    other = searching(pipe, Redness(), n=4, top_k=1, diverse=True)
    with pytest.raises(ValueError, match="run with other settings") as caught:
        fill(other, tmp_path, ["a", PROMPTS[1]], seed=9, settings={"lora": "x"}, eta=0.5)
    for one in ("n: 3 there, 4", "top_k: 2 there", "diverse: False", "seed: 0 there", "'eta': 0.5", "lora: None there"):
        assert one in str(caught.value)
    assert "prompt 0: 'a red apple" in str(caught.value)
    with pytest.raises(ValueError, match="prompts: 2 there, 1 now"):
        fill(searching(pipe, Redness()), tmp_path, PROMPTS[:1], settings={"lora": None})
    assert contents(tmp_path) == before
    (tmp_path / "images" / "mine.png").write_text("mine")
    fill(other, tmp_path, PROMPTS[:1], overwrite=True)
    assert {row["seed"] for row in lines((tmp_path / "results.jsonl").read_text())} == {0, 1, 2, 3}
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert (tmp_path / "images" / "mine.png").read_text() == "mine"


def test_another_scheduler_dtype_or_reward_is_refused(tmp_path: Path) -> None:
    pipe, reward = load_embedded_pipeline(), create_reward("compact")

    def again(changed: Any = reward) -> None:
        fill(searching(pipe, changed, n=1, top_k=1), tmp_path, PROMPTS[:1])

    again()
    scheduler = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading")
    with pytest.raises(ValueError, match=f"scheduler: '{type(scheduler).__name__} .* now") as caught:
        again()
    assert "reward" not in str(caught.value)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    pipe.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype: 'torch.float32' there, 'torch.bfloat16' now"):
        again()
    pipe = load_embedded_pipeline()  # bfloat16 rounded the weights of the other
    nudged = create_reward("compact")
    next(nudged.model.parameters()).mul_(1 + 1e-6)
    with pytest.raises(ValueError, match=r"reward: 'compact .*' there, .* now"):
        again(nudged)
    again()


@pytest.mark.parametrize(
    ("prompts", "more", "error", "message"),
    [
        ("a text", {}, TypeError, "prompts: expected several texts"),
        ([], {}, ValueError, "prompts: expected at least one"),
        (["a", 3], {}, TypeError, r"prompts\[1\]: expected a text"),
        (["a"], {"seed": 2**64 - 2}, ValueError, "seed: expected an integer in"),
        (["a"], {"generator": None}, ValueError, "generator: BestOfN sets"),
        (["a"], {"color": 3}, ValueError, "color: StableDiffusionPipeline has no such argument; it has prompt, "),
        (["a"], {"num_inference_step": 3}, ValueError, "did you mean 'num_inference_steps'"),
    ],
)
def test_wrong_arguments_leave_no_folder(
    pipe: Any, tmp_path: Path, prompts: Any, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        best_of_each(searching(pipe, Redness()), prompts, tmp_path / "out", progress=False, **more)
    assert not (tmp_path / "out").exists()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_batch_run as t
from pathlib import Path
t.fill(t.searching(t.load_embedded_pipeline(), t.Redness()), Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_fill_the_same_folder(pipe: Any, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*torchrun, str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    fill(searching(pipe, Redness()), tmp_path / "one")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert json.loads(one["settings.json"]) == json.loads(two["settings.json"])
    assert one == two

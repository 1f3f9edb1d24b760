"""Preference pairs: which images they are of, resumed folders, refusal of other settings, tables read again."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from breaking import Breaking
from PIL import Image

from aigiqa_reward import load_embedded_pipeline
from aigiqa_reward.datasets import PreferencePairs
from aigiqa_reward.finetuning.pairs import (
    PairLatents,
    build_preference_pairs,
    cover,
    fingerprint,
    read_preference_pairs,
)
from aigiqa_reward.images import load
from aigiqa_reward.sampling import BestOfEachError, RewardGuidance
from aigiqa_reward.sampling.rollout import Rollout

PROMPTS = ["a red apple on a blue background", "a penguin on a red background", "a 'rocket' on <green>"]
SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}


class Brightness(Breaking):
    def __init__(self, fails_on: str = "", error: type[BaseException] = RuntimeError) -> None:
        super().__init__("brightness", lambda images: images.mean(dim=(1, 2, 3)), fails_on, error)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_embedded_pipeline()


@pytest.fixture(scope="module")
def built(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreferencePairs]:
    folder = tmp_path_factory.mktemp("pairs")
    return folder, build(pipe, folder)


def build(pipe: Any, folder: Path, prompts: list[str] = PROMPTS, reward: Any = None, **more: Any) -> PreferencePairs:
    more = {"n": 4, "progress": False, **SETTINGS, **more}
    return build_preference_pairs(pipe, reward or Brightness(), prompts, folder, **more)


def brightness(image: Image.Image | Path) -> float:
    opened = Image.open(image) if isinstance(image, Path) else image
    return float(np.asarray(opened, dtype=np.float64).mean() / 255)


def sampled(pipe: Any, prompt: str, seeds: range, **more: Any) -> list[Image.Image]:
    call = {**SETTINGS, "output_type": "pil", **more}
    return [pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0] for seed in seeds]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(folder / "pairs.parquet").to_pylist()


def test_the_brightest_and_the_darkest_of_the_pipelines_images_are_paired(pipe, built):
    folder, pairs = built
    assert pairs.prompts == tuple(PROMPTS)
    for prompt, better, worse in zip(pairs.prompts, pairs.better, pairs.worse, strict=True):
        found = [brightness(image) for image in sampled(pipe, prompt, range(4))]
        assert brightness(better) == pytest.approx(max(found), abs=2 / 255)
        assert brightness(worse) == pytest.approx(min(found), abs=2 / 255)
    for source in (folder, folder / "pairs.parquet"):
        again = read_preference_pairs(source)
        assert (again.prompts, again.better, again.worse) == (pairs.prompts, pairs.better, pairs.worse)
    for place, row in enumerate(rows_of(folder)):
        assert row["prompt_index"] == place
        assert row["winner_reward"] == pytest.approx(brightness(folder / row["winner"]), abs=1 / 255)
        assert row["loser_reward"] == pytest.approx(brightness(folder / row["loser"]), abs=1 / 255)
        assert row["winner_reward"] > row["loser_reward"]


def test_with_several_scales_an_image_is_paired_with_itself(pipe, tmp_path):
    scales, more = (1.0, 4.0), {"n": 3, "seed": 7, "guidance_scales": (1.0, 4.0)}
    pairs = build(pipe, tmp_path, PROMPTS[:1], pairs_per_prompt=2, **more)
    assert pairs.prompts == (PROMPTS[0],) * 2
    found = [[brightness(i) for i in sampled(pipe, PROMPTS[0], range(7, 10), guidance_scale=s)] for s in scales]
    widest = sorted(zip(*found, strict=True), key=lambda row: min(row) - max(row))[:2]
    for better, worse, row in zip(pairs.better, pairs.worse, widest, strict=True):
        assert brightness(better) == pytest.approx(max(row), abs=2 / 255)
        assert brightness(worse) == pytest.approx(min(row), abs=2 / 255)
        assert better.name == worse.name, "one seed"
        assert better.parent != worse.parent
    again = read_preference_pairs(tmp_path)
    assert (again.prompts, again.better, again.worse) == (pairs.prompts, pairs.better, pairs.worse)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    shown: list[tuple[int, int]] = []
    assert len(build(pipe, tmp_path, PROMPTS[:2], progress=lambda *done: shown.append(done), **more)) == 2
    assert shown[-1] == (6, 6), "a second prompt, three images at two scales"
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}.items()


def test_with_reward_guidance_an_image_is_paired_with_its_own_climb(pipe, tmp_path):
    more: dict[str, Any] = {"n": 2, "seed": 7, "reward_guidance": 400.0, "pairs_per_prompt": 2, "batch_size": 1}
    pairs = build(pipe, tmp_path, PROMPTS[:1], **more)
    assert len(pairs) == 2
    for better, worse in zip(pairs.better, pairs.worse, strict=True):
        seed = int(better.stem.rpartition("seed")[2])
        with RewardGuidance(pipe, Brightness(), PROMPTS[0], scale=400.0) as guidance:
            (climbed,) = sampled(pipe, PROMPTS[0], range(seed, seed + 1), callback_on_step_end=guidance)
        (plain,) = sampled(pipe, PROMPTS[0], range(seed, seed + 1))
        assert better.name == worse.name, "one seed"
        assert brightness(better) == pytest.approx(brightness(climbed), abs=1 / 255)
        assert brightness(worse) == pytest.approx(brightness(plain), abs=1 / 255)
        assert brightness(better) > brightness(worse) + 0.01
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    stronger = build(pipe, tmp_path, PROMPTS[:1], **{**more, "reward_guidance": 500.0})
    assert stronger.worse == pairs.worse, "those without guidance serve again"
    assert not {*stronger.better} & {*pairs.better}
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}.items()


def test_what_cannot_be_guided_by_the_reward_is_refused_before_sampling(pipe, tmp_path):
    def numbers(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return images.detach().mean(dim=(1, 2, 3))

    guided = {"reward_guidance": 1.0}
    for match, more in {
        r"reward: reward_guidance needs its gradient .*numbers returns scores": {"reward": numbers, **guided},
        r"guidance_scales, reward_guidance: .* pass one": {"guidance_scales": (1, 2), **guided},
        r"callback_on_step_end: reward_guidance is one itself": {"callback_on_step_end": lambda *_: {}, **guided},
    }.items():
        with pytest.raises(ValueError, match=match):
            build(pipe, tmp_path, **more)
    assert not list(tmp_path.rglob("*.png"))


def test_another_margin_or_number_of_pairs_samples_nothing(pipe, built):
    folder, pairs = built
    gaps = sorted(row["winner_reward"] - row["loser_reward"] for row in rows_of(folder))
    reward = Brightness()
    try:
        fewer = build(pipe, folder, reward=reward, margin=(gaps[0] + gaps[1]) / 2)
        assert len(fewer) == 2
        more = build(pipe, folder, reward=reward, pairs_per_prompt=2)
        assert more.prompts == tuple(prompt for prompt in PROMPTS for _ in range(2))
        assert more.better[::2] == pairs.better
        for place in range(0, 6, 2):  # from the outside in
            row = [brightness(file) for file in (more.better[place], more.better[place + 1], more.worse[place + 1])]
            assert row == sorted(row, reverse=True)
            assert row[-1] >= brightness(more.worse[place])
        with pytest.raises(ValueError, match=rf"margin: no prompt .* more than 0\.9; .* is {gaps[-1]:.4g}: lower"):
            build(pipe, folder, reward=reward, margin=0.9)
        with pytest.raises(ValueError, match=r"pairs: .*pairs\.parquet has no pair: lower the margin"):
            read_preference_pairs(folder)
    finally:
        assert build(pipe, folder, reward=reward).better == pairs.better
    assert reward.prompts == []


def test_refused_candidates_and_ties_are_in_no_pair(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"no prompt has two images whose rewards differ by more than 0\.0; the"):
        build(pipe, tmp_path / "ties", PROMPTS[:1], lambda images, prompts: torch.zeros(len(images)), n=2)

    def not_the_brightest(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        bright = images.mean(dim=(1, 2, 3))
        return torch.where(bright == bright.max(), torch.nan, bright)

    with pytest.warns(UserWarning, match="NaN"):
        pairs = build(pipe, tmp_path / "nan", PROMPTS[:1], not_the_brightest)
    found = sorted(brightness(image) for image in sampled(pipe, PROMPTS[0], range(4)))
    assert brightness(pairs.better[0]) == pytest.approx(found[-2], abs=2 / 255)
    assert brightness(pairs.worse[0]) == pytest.approx(found[0], abs=2 / 255)


def test_an_interrupted_run_is_continued_prompt_by_prompt(pipe, built, tmp_path):
    broken = Brightness(fails_on=PROMPTS[1])
    with pytest.raises(BestOfEachError):
        build(pipe, tmp_path, reward=broken)
    done = [PROMPTS[0], PROMPTS[2]]
    assert broken.prompts == [prompt for prompt in done for _ in range(4)]
    assert read_preference_pairs(tmp_path).prompts == tuple(done)
    reward = Brightness()
    pairs = build(pipe, tmp_path, reward=reward)
    assert reward.prompts == [PROMPTS[1]] * 4
    whole, expected = built
    assert rows_of(tmp_path) == rows_of(whole)
    assert [file.read_bytes() for file in pairs.better] == [file.read_bytes() for file in expected.better]


def test_bad_arguments_and_a_missing_extra_are_refused_before_sampling(pipe, tmp_path, monkeypatch):
    for match, arguments in {
        r"n: expected an integer of at least 2, got 1": {"n": 1},
        r"pairs_per_prompt: expected at most n / 2 = 2, got 3; raise n": {"pairs_per_prompt": 3},
        r"margin: expected a number of at least 0, .* got nan": {"margin": float("nan")},
        r"num_steps: .* has no such argument": {"num_steps": 3},
        r"prompts: expected at least one text, got none": {"prompts": [], "reward_guidance": 1.0},
    }.items():
        with pytest.raises(ValueError, match=match):
            build(pipe, tmp_path / "new", **arguments)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pairs\.parquet needs pyarrow.parquet; pip install "\.\[da'):
        build(pipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "pairs.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r'pip install "\.\[data\]"'):
        read_preference_pairs(tmp_path)


def write(file: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def png(color: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(data, format="PNG")
    return data.getvalue()


def test_peoples_choices_in_the_layout_of_pick_a_pic_are_read(tmp_path):
    white, black = png((255, 255, 255)), png((0, 0, 0))
    columns = {"caption": ["bright", "dark", "no choice"], "jpg_0": [white] * 3, "jpg_1": [black] * 3}
    columns |= {"label_0": [1.0, 0.0, 0.5], "label_1": [0.0, 1.0, 0.5], "ranking_id": [1, 2, 3]}
    file = write(tmp_path / "train-00000-of-00001.parquet", **columns)
    for source in (file, tmp_path):
        pairs = read_preference_pairs(source)
        assert pairs.prompts == ("bright", "dark")
        assert [brightness(image) for image in pairs.better] == [1.0, 0.0]
        assert [brightness(image) for image in pairs.worse] == [0.0, 1.0]


def test_a_table_of_three_columns_is_read_and_others_are_refused(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png((9, 9, 9)))
    pairs = read_preference_pairs(write(tmp_path / "own.parquet", prompt=["x"], winner=["a.png"], loser=["b.png"]))
    assert (pairs.better, pairs.worse) == ((tmp_path / "a.png",), (tmp_path / "b.png",))
    (tmp_path / "text.parquet").write_text("prompt,winner,loser")
    write(tmp_path / "columns.parquet", prompt=["x"], winner=["a.png"])
    write(tmp_path / "blank.parquet", prompt=["x", " "], winner=["a", "b"], loser=["b", None])
    write(tmp_path / "absent.parquet", prompt=["x"], winner=["gone.png"], loser=["text.parquet"])
    for name, message in {
        "none": r"pairs: no file .*none.parquet; expected a folder or a Parquet file of build_preference_pairs",
        "text": r"pairs: cannot read .*text\.parquet as Parquet",
        "columns": r"no column loser; expected prompt, winner, loser, or .* got prompt, winner$",
        "blank": r"row 1 \(the first is 0\): expected a text in prompt, loser",
        "absent": r"1 of the 2 images named in .* are missing \(first: .*gone\.png\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_preference_pairs(tmp_path / f"{name}.parquet")


def test_fingerprints_tell_pairs_apart_and_do_not_know_their_folder(built, tmp_path):
    _, pairs = built
    moved = PreferencePairs(
        prompts=pairs.prompts,
        better=tuple(tmp_path / file.name for file in pairs.better),
        worse=tuple(tmp_path / file.name for file in pairs.worse),
    )
    swapped = PreferencePairs(prompts=pairs.prompts, better=pairs.worse, worse=pairs.better)
    assert fingerprint(moved) == fingerprint(pairs)
    assert len({fingerprint(pairs), fingerprint(swapped), fingerprint(pairs.subset([0, 1]))}) == 3


@torch.no_grad()
def test_latents_are_those_of_the_files_encoded_once_within_bounds(pipe, built):
    _, pairs = built
    family = Rollout(pipe, **SETTINGS).family
    expected = [torch.stack([family.encode_images(load(f)[None])[0] for f in fs]) for fs in (pairs.better, pairs.worse)]
    calls: list[int] = []
    hook = pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    for kept, batches in ((3, ([0, 1], [1, 0], [2, 2], [0, 1])), (1, ([0, 1], [1, 0]))):
        calls.clear()
        latents = PairLatents(pairs, most=kept * 2 * expected[0][0].nbytes)
        for places in batches:
            for found, files in zip(latents(family, places), expected, strict=True):
                torch.testing.assert_close(found, files[places], atol=1e-5, rtol=1e-5)
        assert len(calls) == 3, "each once, or the one that is not kept twice"
    latents(Rollout(pipe, **SETTINGS).family, [0])
    assert len(calls) == 4, "latents of another pipeline are not these"
    hook.remove()


@pytest.mark.parametrize(("height", "width"), [(128, 64), (40, 50)])
def test_images_of_other_sizes_are_cut_evenly_at_both_ends(height, width):
    tall, share = height >= width, min(height, width) / max(height, width)
    ramp = torch.linspace(0, 1, max(height, width)).view((-1, 1) if tall else (1, -1))
    found = cover(ramp.expand(1, 3, height, width), (64, 64))
    assert found.shape == (1, 3, 64, 64)
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01)
    line = found[0, 0, :, 32] if tall else found[0, 0, 32]
    assert float(line[-8:].mean() - line[:8].mean()) == pytest.approx(share * 56 / 64, abs=0.02)

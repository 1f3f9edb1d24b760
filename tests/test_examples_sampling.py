"""The examples of sampling, run as they stand with the embedded pipeline, or with blocks of Modular Diffusers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from PIL import Image

from aigiqa_reward import create_reward, load_embedded_pipeline, rerank

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMPT = "a red apple on a blue background"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_embedded_pipeline()


def test_stable_diffusion(pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import best_of_n_sd15

    result = best_of_n_sd15.main(PROMPT, tmp_path, n=4, top_k=1, steps=4, guidance_scale=1.0, pipe=pipe)
    assert result.denoiser_calls < 16
    assert f"{result.denoiser_calls} denoiser calls instead of 16" in capsys.readouterr().out
    generator = torch.Generator("cpu").manual_seed(result.seeds[0])
    again = pipe(PROMPT, generator=generator, num_inference_steps=4, guidance_scale=1.0).images[0]
    written = np.asarray(Image.open(tmp_path / f"seed{result.seeds[0]}.png"), dtype=int)
    assert np.abs(written - np.asarray(again)).max() <= 2
    assert "<polyline" in (tmp_path / "index.html").read_text()


def test_stable_diffusion_xl(pipe: Any, tmp_path: Path) -> None:
    import best_of_n_sdxl

    settings = {"n": 4, "top_k": 2, "steps": 2, "guidance_scale": 3.0}
    result = best_of_n_sdxl.main(PROMPT, tmp_path, **settings, quality_weight=1.0, pipe=pipe)
    assert result.scores == pytest.approx(result.quality, abs=1e-6)
    assert len(list(tmp_path.glob("0*_seed*.png"))) == 2
    assert (tmp_path / "contact-sheet.png").is_file()


def test_flux(pipe: Any, tmp_path: Path) -> None:
    import best_of_n_flux

    settings: dict[str, Any] = {"n": 2, "steps": 2, "guidance_scale": 1.0, "device": "cpu", "pipe": pipe}
    page = best_of_n_flux.main([PROMPT, "a penguin"], tmp_path, **settings)
    assert page.read_text().count("<article") == 2
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_the_modular_block_behind_a_decoder() -> None:
    from rerank_modular_block import RerankBlock

    blocks = SequentialPipelineBlocks.from_blocks_dict({"decode": StableDiffusionXLDecodeStep()})
    blocks.sub_blocks.insert("rerank", RerankBlock(), len(blocks.sub_blocks))
    together, alone = blocks.init_pipeline(), StableDiffusionXLDecodeStep().init_pipeline()
    parts = {"vae": pipelines.stable_diffusion_xl().vae, "image_processor": VaeImageProcessor(vae_scale_factor=2)}
    reward = create_reward("compact")
    together.update_components(**parts, reward=reward)
    alone.update_components(**parts)
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    decoded = alone(latents=latents).get("images")
    expected = rerank(decoded, PROMPT, reward)
    state = together(latents=latents, prompt=[PROMPT])
    assert state.get("ranking") == expected.seeds
    for image, place in zip(state.get("images"), expected.seeds, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(decoded[place]))

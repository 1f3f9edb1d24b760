"""A smaller decoder for the images to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipelines
import pipelines_current
import pytest
import torch
from finetuned import CALL, PROMPTS, warmth
from torch import Tensor

from aigiqa_reward import create_reward
from aigiqa_reward.finetuning import FinetuneConfig
from aigiqa_reward.finetuning.algorithms.base import score_latents
from aigiqa_reward.finetuning.context import create_context
from aigiqa_reward.finetuning.validation import Validation


def context_with(pipe: Any, decoder: object, folder: Path) -> Any:
    return create_context(pipe, warmth, FinetuneConfig(decoder=str(decoder), sampling=CALL), folder, None)


def test_it_decodes_what_is_trained_on_and_no_validation(tmp_path: Path) -> None:
    pipe, tiny = pipelines.stable_diffusion(), pipelines.tiny_decoder()
    vae = pipe.vae
    tiny.save_pretrained(tmp_path / "tiny")
    context = context_with(pipe, tmp_path / "tiny", tmp_path)
    assert pipe.vae is vae
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected: Tensor = (tiny.decode(latents).sample + 1) / 2
    images = context.decode(latents)
    torch.testing.assert_close(images, expected)
    slope, right = (torch.autograd.grad(each.square().sum(), latents)[0] for each in (images, expected))
    torch.testing.assert_close(slope, right)
    shown = warmth(expected.detach().clamp(0, 1), [PROMPTS[0]])
    torch.testing.assert_close(score_latents(context, latents.detach(), PROMPTS[:1])["reward"], shown)

    validation = Validation(context, PROMPTS[:1], create_reward("compact"), seeds=1)
    call = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", **CALL}
    torch.testing.assert_close(validation.images([0]).clamp(0, 1), pipe(prompt=PROMPTS[0], **call).images)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"latent_channels": 16}, "expected 4 latent channels as in the pipeline's VAE, got 16 in"),
        ({"levels": 4}, "expected 2 pixels per latent side as in the pipeline's VAE, got 8 in"),
    ],
)
def test_one_that_does_not_fit_is_refused(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    pipelines.tiny_decoder(**sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^decoder: {message}"):
        context_with(pipelines.stable_diffusion(), tmp_path, tmp_path)


def test_what_is_none_is_refused(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    pipe.vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^decoder: expected an AutoencoderTiny in .*, got AutoencoderKL"):
        context_with(pipe, tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"^decoder: expected a folder or Hub id"):
        context_with(pipe, tmp_path / "none", tmp_path)
    with pytest.raises(ValueError, match=r"^decoder: .*Flux2Pipeline prepares latents for its AutoencoderKLFlux2"):
        context_with(pipelines_current.flux_2(), tmp_path, tmp_path)

"""The numbers of the original implementations of published rewards, on tiny weights in the authors' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aigiqa_reward import Reward, Scorer, create_reward

FOLDER = Path(__file__).parents[2] / "shared" / "parity"
RAW = {"clipscore": "cosine"}
"""Name of the score that `details["raw"]` is, where it is not "score"."""
TOLERANCE = {"hpsv3": 1e-4}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the folder of parity vectors beside the checkout")


class Case(NamedTuple):
    name: str
    reward: Reward
    tensors: dict[str, Tensor]
    prompts: list[str] | None

    def expected(self, which: str) -> Tensor:
        return self.tensors[f"{RAW.get(self.name, 'score')}_{which}"]


PARITY = (
    "pickscore", "hpsv2.1", "clipscore", "siglip2", "laion_aesthetic", "mps", "imagereward", "cyclereward", "vqascore",
    "hpsv3",
)  # fmt: skip


@pytest.fixture(scope="module", params=PARITY)
def case(request: pytest.FixtureRequest) -> Case:
    folder = FOLDER / request.param
    prompts = json.loads((folder / "prompts.json").read_text()) if (folder / "prompts.json").exists() else None
    reward = create_reward(request.param, weights=folder).double()
    return Case(request.param, reward, load_file(folder / "cases.safetensors"), prompts)


@pytest.mark.filterwarnings("ignore:prompt of")
def test_scores_and_gradients_equal_the_original(case: Case) -> None:
    images = case.tensors["float_images"].requires_grad_()
    raw = case.reward(images, case.prompts).details["raw"]
    assert raw.dtype == torch.float64
    torch.testing.assert_close(raw, case.expected("float"), rtol=0, atol=TOLERANCE.get(case.name, 1e-6))
    (gradient,) = torch.autograd.grad(raw.sum(), images)
    name = "grad_float" if "grad_float" in case.tensors else f"grad_{RAW.get(case.name, 'score')}_float"
    expected = case.tensors[name]
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:prompt of")
def test_files_score_as_the_original(case: Case) -> None:
    images = [case.tensors[f"image_{i}"].permute(1, 2, 0).numpy() for i in range(4)]
    raw = Scorer(case.reward).score(images, case.prompts).details["raw"]
    which = "uint8_unrounded" if f"{RAW.get(case.name, 'score')}_uint8_unrounded" in case.tensors else "uint8"
    expected = case.expected(which)
    torch.testing.assert_close(raw.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))

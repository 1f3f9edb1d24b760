"""CPA-IQA: its five components in plain numpy on a tiny CLIP, scenarios, regions, and preference files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import array, cosine, draw, linear, relu, stir, tiny_clip
from scipy.special import expit, logsumexp, softmax
from tiny_transformers import write_tiny_sam
from torch import Tensor

from aigiqa_reward import Reward
from aigiqa_reward.assistants import SAMSegmenter, SegmenterConfig, grid_regions
from aigiqa_reward.encoders.open_clip import OpenCLIPEncoder
from aigiqa_reward.models.cpa_iqa import COMPONENTS, CPAIQA, DISTORTIONS, UNIFORM, CPAIQAConfig, Preferences
from aigiqa_reward.rewards.build import empty_model
from aigiqa_reward.rewards.factory import get_reward_spec

PROMPTS = ["a cat; a red hat; a blue vase", "a dog", "two apples; a cup"]
MATRIX = Preferences(
    {
        "zebra": (0.3, -1.0, 0.5, 2.0, 0.0),  # not in alphabetical order, as a file may be
        "archive": (1.0, 0.0, -2.0, 0.4, 0.7),
        "poster": (0.0, 1.5, 0.2, -0.3, 1.0),
    }
)


def phrases(text: str) -> list[str]:
    return [part.strip() for part in text.split(";")]


@dataclass(frozen=True)
class Shouting:
    def decompose(self, texts: list[str]) -> list[list[str]]:
        return [[phrase.upper() + "!" for phrase in phrases(text)] + ["seen in daylight"] for text in texts]


@dataclass(frozen=True)
class Masks:
    masks: Tensor

    def segment(self, images: Tensor) -> Tensor:
        return self.masks.expand(len(images), -1, -1, -1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> OpenCLIPEncoder:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return draw(3, 32, 32)


def build(clip: OpenCLIPEncoder, *, segmenter: Any = None, attributes: Any = None, **settings: Any) -> CPAIQA:
    config = CPAIQAConfig(**{"hidden": 12, "preferences": MATRIX, "scenario": "archive"} | settings)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = CPAIQA(config, clip, phrases=phrases, levels=False, segmenter=segmenter, attributes=attributes)
    stir(model.head)
    model.head.tokens.fit(draw(40, 32, 1)[:, 0, :, 0, None, None])
    return model.double().eval()


def smooth(values: list[float]) -> float:
    return (logsumexp(10 * np.array(values)) - np.log(len(values))) / 10


class Plain:
    def __init__(self, model: CPAIQA, clip: OpenCLIPEncoder, image: Tensor) -> None:
        self.head, self.clip = model.head, clip
        self.v = array(clip.encode_image(image[None]))[0]
        self.places = array(clip.encode_map(image[None]))[0].reshape(32, 16).T  # (16, 32)
        centered = (self.places - array(self.head.tokens.mean)) / array(self.head.tokens.deviation)
        self.maps = linear(self.head.maps, centered)  # (16, 12)
        self.tokens = centered

    def embed(self, text: str) -> np.ndarray:
        return array(self.clip.encode_text([text]))[0]

    def components(self, prompt: str, latent: list[str]) -> list[float]:
        head = self.head
        slope, offset = array(head.slopes), array(head.offsets)
        best = [smooth([cosine(place, self.embed(t)) for place in self.places]) for t in phrases(prompt)]
        present = []
        for text in latent:
            v, t = self.v / np.linalg.norm(self.v), self.embed(text) / np.linalg.norm(self.embed(text))
            joined = np.concatenate([v, t, v * t * np.sqrt(32)])
            present.append(expit(linear(head.implicit[2], relu(linear(head.implicit[0], joined)))[0]))
        severity = [expit(smooth(list(self.maps[:, d]))) for d in range(12)]
        impact = np.logaddexp(0, array(head.impact))
        statistics = np.concatenate([self.tokens.mean(axis=0), self.tokens.std(axis=0)])
        return [
            expit(slope[0] * (cosine(self.v, self.embed(prompt)) - offset[0])),
            expit(slope[1] * (np.mean(best) - offset[1])),
            float(np.mean(present)),
            expit(array(head.tolerance) - sum(i * y for i, y in zip(impact, severity, strict=True))),
            expit(linear(head.low_level[3], relu(linear(head.low_level[0], statistics)))[0]),
        ]


@pytest.mark.parametrize("reader", [None, Shouting()], ids=["phrases", "reader"])
def test_components_and_scores_are_the_equations(reader: Any, clip: OpenCLIPEncoder, images: Tensor) -> None:
    model = build(clip, attributes=reader)
    output = model(images, model.encode_prompts(PROMPTS))
    weights = softmax(MATRIX["archive"])
    latent = (reader.decompose(PROMPTS)) if reader else [phrases(prompt) for prompt in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        plain = Plain(model, clip, images[i])
        parts = plain.components(prompt, latent[i])
        assert np.allclose(array(output.details["components"][i]), parts)
        assert np.isclose(array(output.details["score"][i]), 100 * np.dot(weights, parts))
        assert np.isclose(array(output.correspondence[i]), np.average(parts[:3], weights=weights[:3]))
        assert np.isclose(array(output.quality[i]), np.average(parts[3:], weights=weights[3:]))
        found = array(output.details["distortion_maps"][i]).reshape(12, 16).T
        assert np.allclose(found, expit(plain.maps))
    assert output.details["components"].std(dim=0).min() > 1e-3
    assert output.details["substitute_attributes"].tolist() == [reader is None] * 3
    assert torch.equal(model(images, None).quality, output.quality)
    severity, maps = output.details["severity"], output.details["distortion_maps"]
    assert severity.shape == (3, len(DISTORTIONS)) == (3, 12)
    assert (severity <= maps.flatten(2).max(dim=2).values).all(), "no worse than the worst place"
    assert build(clip, distortions=("blur", "noise"))(images, None).details["severity"].shape == (3, 2)


def test_a_scenario_weighs_the_same_components_by_its_row(clip: OpenCLIPEncoder, images: Tensor) -> None:
    seen = {}
    for scenario in MATRIX:
        model = build(clip, scenario=scenario)
        output = model(images, model.encode_prompts(PROMPTS))
        seen[scenario] = components = array(output.details["components"])
        assert np.allclose(array(output.details["score"]), 100 * components @ softmax(MATRIX[scenario]))
    assert np.allclose(seen["zebra"], seen["poster"])
    assert MATRIX.matrix()[MATRIX.row("poster")] == list(MATRIX["poster"])
    uniform = build(clip, preferences=UNIFORM, scenario="general")
    uniform.load_state_dict(model.state_dict())  # the matrix is a setting: another one goes with the same weights
    score = uniform(images, uniform.encode_prompts(PROMPTS)).details["score"]
    assert np.allclose(array(score), 100 * components.mean(axis=1))


def test_tiers_left_out_count_nowhere(clip: OpenCLIPEncoder, images: Tensor) -> None:
    tiers = ("local", "implicit")
    model = build(clip, tiers=tiers)
    output = model(images, model.encode_prompts(PROMPTS))
    components, weights = array(output.details["components"]), softmax(MATRIX["archive"])
    kept = [COMPONENTS.index(name) for name in tiers]
    expected = np.average(components[:, kept], weights=weights[kept], axis=1)
    assert np.allclose(array(output.correspondence), expected)
    both = [*kept, 3, 4]
    assert np.allclose(
        array(output.details["score"]), 100 * np.average(components[:, both], weights=weights[both], axis=1)
    )


def test_masks_of_the_grids_cells_are_the_grid(clip: OpenCLIPEncoder, images: Tensor) -> None:
    plain, masked = build(clip, grid=2), build(clip, segmenter=Masks(grid_regions(2, 2)), grid=2)
    outputs = [m(images, m.encode_prompts(PROMPTS)) for m in (plain, masked)]
    assert torch.allclose(outputs[0].details["components"], outputs[1].details["components"])
    assert [o.details["substitute_regions"].tolist() for o in outputs] == [[True] * 3, [False] * 3]
    whole = build(clip, segmenter=Masks(torch.ones(1, 64, 64)))
    local = whole(images, whole.encode_prompts(PROMPTS)).details["components"][:, 1]
    assert (local - outputs[0].details["components"][:, 1]).abs().min() > 1e-4


def test_regions_are_found_in_the_letterboxed_image_without_gradients(clip: OpenCLIPEncoder, tmp_path: Path) -> None:
    segmenter = SAMSegmenter(SegmenterConfig(path_or_id=str(write_tiny_sam(tmp_path / "sam"))))
    model, wide = build(clip, segmenter=segmenter), draw(2, 24, 48)
    square = torch.nn.functional.interpolate(wide, (16, 32), mode="bicubic", antialias=True)
    canvas = wide.new_tensor(clip.mean).view(1, 3, 1, 1).repeat(2, 1, 32, 32)
    canvas[:, :, 8:24] = square
    regions = model.prepare(wide.clone().requires_grad_(), None)["regions"]
    assert torch.equal(regions, segmenter.segment(canvas).double())
    assert not regions.requires_grad
    prompts = model.encode_prompts(PROMPTS[:2])
    assert torch.equal(model(wide, prompts).correspondence, model(wide, prompts, {"regions": regions}).correspondence)
    with pytest.raises(ValueError, match=r"trained with a segmenter.*Assistants\(segmenter="):
        empty_model("cpa_iqa", json.loads(json.dumps(model.describe())))


@pytest.mark.parametrize("learned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_saved_reward_keeps_its_scenario(learned, clip, images, tmp_path):
    model = build(clip, learn_preferences=learned, tiers=("global", "implicit"), grid=2)
    again = empty_model("cpa_iqa", json.loads(json.dumps(model.describe()))).double().eval()
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    prompts = ["cats", "dogs", "cups"]  # every reader of phrases finds just these
    expected = model(images, model.encode_prompts(prompts))
    found = again(images, again.encode_prompts(prompts))
    assert torch.equal(found.quality, expected.quality)
    assert torch.allclose(found.correspondence, expected.correspondence)
    Reward(model, get_reward_spec("cpa_iqa")).save_pretrained(tmp_path)
    loaded = Reward.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).quality, expected.quality), "a file may list the scenarios in another order"


def test_unknown_scenarios_and_settings_are_refused(clip: OpenCLIPEncoder) -> None:
    with pytest.raises(ValueError, match=r"no.* called 'cinema'; there are zebra, archive, poster"):
        build(clip, scenario="cinema")
    with pytest.raises(ValueError, match=r"tiers: expected some of \('global', 'local', 'implicit'\), got \('low',\)"):
        CPAIQAConfig(tiers=("low",))
    with pytest.raises(ValueError, match="distortions: expected distinct names"):
        CPAIQAConfig(distortions=("blur", "blur"))
    assert set(UNIFORM.values()) == {(0.0,) * 5}


def test_preferences_are_read_by_name_in_any_order(tmp_path: Path) -> None:
    rows = {name: dict(zip(COMPONENTS[::-1], row[::-1], strict=True)) for name, row in list(MATRIX.items())[::-1]}
    (tmp_path / "m.json").write_text(json.dumps(rows))
    read = Preferences.load(tmp_path / "m.json")
    assert read == MATRIX
    assert hash(read) == hash(MATRIX)
    assert read.matrix() == MATRIX.matrix()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[1, 2]", "not iterable|cannot convert"),
        ("{}", "at least one scenario"),
        ('{"poster": [1, 2, 3, 4, NaN]}', "finite weights of .* for 'poster'"),
        (f'{{"poster": [{10**400}, 2, 3, 4, 5]}}', "finite weights of .* for 'poster'"),
        ('{"poster": {"global": 1}}', "finite weights of .* for 'poster'"),
    ],
)
def test_files_that_hold_no_matrix_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    with pytest.raises(ValueError, match=rf"preferences: cannot read .*m\.json' .*({message})"):
        Preferences.load(tmp_path / "m.json")

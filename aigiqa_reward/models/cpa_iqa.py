"""CPA-IQA: contextual, preference-aligned assessment: three tiers of alignment, distortion maps, a scenario's weights.

    global      s_g = sigmoid(a (cos(v, t) - b)), v and t the image's and the prompt's joint embeddings
    local       s_l = sigmoid(a_l (mean_j smoothmax_i cos(v_i, t_j) - b_l)), v_i of regions, t_j of noun phrases
    implicit    s_i = mean_j p(a_j | I), p(a_j | I) = sigmoid(MLP [v; t_j; v * t_j]), a_j latent attributes
    distortion  y_d = sigmoid(smoothmax over places of map_d), 12 maps;  s_d = sigmoid(c - sum_d omega_d y_d), omega > 0
    low level   s_low = sigmoid(MLP [mean; deviation of the tokens])
    scenario    c = softmax(M_S), a row of the preference matrix;   Q = 100 c . [s_g, s_l, s_i, s_d, s_low]

The components keep apart what the aspects ask for: correspondence is the c-weighted mean of s_g, s_l and s_i, quality
that of s_d and s_low; `details["score"]` is Q, `details["components"]` all five, `details["distortion_maps"]` the maps.

Source: CPA-IQA, whose equations are lost in the available text; nearly all of the above is our inference. The maps are
learned from whole-image scores alone: they are named after what they should detect, which has not been validated. A
region's embedding is the mean of the joint map under its mask, where the paper encodes softly masked crops. Without a
segmenter the regions are a grid, without a language model the attributes are noun phrases; `details` marks both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from aigiqa_reward.assistants.base import AttributeReader, Segmenter
from aigiqa_reward.models.base import FullPrecision, ModelConfig, ModelOutput, Seen, Standardize, TrainedModel
from aigiqa_reward.models.blocks import masked_mean
from aigiqa_reward.models.towers import ContrastiveEncoder, View, square_view
from aigiqa_reward.types import Context, Images, PromptFeatures
from aigiqa_reward.utils.io import read_json

COMPONENTS = ("global", "local", "implicit", "distortion", "low_level")
"""Columns of the preference matrix: three tiers of alignment, absence of distortions, low-level fidelity."""


class Preferences(Mapping[str, tuple[float, ...]]):
    """Weights of the five components for each scenario, before a softmax over the components.

    Example:
        >>> from aigiqa_reward import create_reward
        >>> from aigiqa_reward.models.cpa_iqa import Preferences
        >>> sharp = {"global": 0, "local": 0, "implicit": 0, "distortion": 1, "low_level": 1}
        >>> preferences = Preferences({"poster": sharp})
        >>> create_reward("cpa_iqa", preferences=preferences, scenario="poster").name
        'cpa_iqa'
    """

    def __init__(self, rows: Mapping[str, Mapping[str, float] | tuple[float, ...] | list[float]]) -> None:
        self._rows = {str(name): self._checked(str(name), row) for name, row in rows.items()}
        if not self._rows:
            raise ValueError("preferences: expected at least one scenario, got none")

    @staticmethod
    def _checked(name: str, row: Mapping[str, float] | tuple[float, ...] | list[float]) -> tuple[float, ...]:
        try:
            if isinstance(row, Mapping) and set(row) == set(COMPONENTS):
                row = [row[component] for component in COMPONENTS]
            values = tuple(float(value) for value in row)
        except (TypeError, ValueError, OverflowError):
            values = ()
        if len(values) != len(COMPONENTS) or not all(map(math.isfinite, values)):
            raise ValueError(f"preferences: expected finite weights of {COMPONENTS} for {name!r}, got {row!r}")
        return values

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preferences:
        """Read a JSON file: {"scenario": {"global": 0, "local": 0, "implicit": 0, "distortion": 1, "low_level": 1}}."""
        try:
            return cls(dict(read_json(path)))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"preferences: cannot read {os.fspath(path)!r} as scenarios in JSON ({error})") from error

    def row(self, scenario: str) -> int:
        """Return the row of a scenario in the matrix, whose rows are in alphabetical order."""
        if scenario not in self._rows:
            raise ValueError(f"scenario: there is none called {scenario!r}; there are {', '.join(self._rows)}")
        return sorted(self._rows).index(scenario)

    def matrix(self) -> list[list[float]]:
        """Return the weights, scenarios x components."""
        return [list(self._rows[scenario]) for scenario in sorted(self._rows)]

    def __getitem__(self, scenario: str) -> tuple[float, ...]:
        return self._rows[scenario]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __hash__(self) -> int:  # so that a frozen configuration can hold it
        return hash(frozenset(self._rows.items()))


SCENARIOS = ("general", "photograph", "illustration", "product", "cultural_heritage", "poster")

UNIFORM = Preferences({name: (0.0,) * len(COMPONENTS) for name in SCENARIOS})
"""The default: uniform weights, not fitted to human preferences."""

# fmt: off
DISTORTIONS = (
    "anatomical_error", "physical_law_violation", "rendering_artifact", "texture_repetition", "edge_blur",
    "light_shadow_contradiction", "noise", "compression", "color_cast", "over_smoothing", "warped_geometry",
    "garbled_text",
)
# fmt: on
"""The first six are named in the paper; the other six are our choice. `CPAIQAConfig.distortions` replaces them."""

SHARPNESS = 10.0  # s of the smooth maxima (our choice)


@dataclass(frozen=True, kw_only=True)
class CPAIQAConfig(ModelConfig):
    """Settings of CPA-IQA.

    Attributes:
        side: side in px of the letterboxed image; towers of a fixed size ignore it.
        tiers: tiers that count, of "global", "local" and "implicit", as an ablation.
        attributes: most latent attributes, and noun phrases, per prompt.
        grid: rows and columns of the regions without a segmenter.
        distortions: names of the maps.
        scenario: row of `preferences`.
        learn_preferences: whether the scenario's row is trained too.
    """

    hidden: int = 128
    side: int = 224
    tiers: tuple[str, ...] = ("global", "local", "implicit")
    attributes: int = 8
    grid: int = 4
    distortions: tuple[str, ...] = DISTORTIONS
    scenario: str = "general"
    preferences: Preferences = UNIFORM
    learn_preferences: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tiers", "distortions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.tiers or not set(self.tiers) <= set(COMPONENTS[:3]):
            raise ValueError(f"tiers: expected some of {COMPONENTS[:3]}, got {self.tiers}")
        if not self.distortions or len(set(self.distortions)) != len(self.distortions):
            raise ValueError(f"distortions: expected distinct names, at least one, got {self.distortions}")
        if isinstance(self.preferences, Mapping):
            object.__setattr__(self, "preferences", Preferences(self.preferences))
        self.preferences.row(self.scenario)


def smooth_maximum(values: Tensor, dim: int, used: Tensor | None = None) -> Tensor:
    """Compute (logsumexp(s x) - log n) / s over the n used entries of a dimension: between their mean and maximum."""
    used = torch.ones_like(values, dtype=torch.bool) if used is None else used
    count = used.sum(dim=dim).to(values.dtype)
    return ((SHARPNESS * values).masked_fill(~used, -torch.inf).logsumexp(dim=dim) - count.log()) / SHARPNESS


class CPAHead(FullPrecision):
    """Everything behind the towers."""

    def __init__(self, config: CPAIQAConfig, channels: int, width: int) -> None:
        super().__init__()
        count = len(config.distortions)
        self.tokens = Standardize(channels, axis=-3)
        self.slopes = nn.Parameter(torch.tensor([4.0, 4.0]))  # of the global and the local tier
        self.offsets = nn.Parameter(torch.tensor([0.1, 0.2]))
        self.implicit = nn.Sequential(nn.Linear(3 * width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1))
        self.maps = nn.Conv2d(channels, count, 1)
        self.impact = nn.Parameter(torch.zeros(count))
        self.tolerance = nn.Parameter(torch.tensor(float(count) * 0.35))
        self.low_level = nn.Sequential(
            nn.Linear(2 * channels, config.hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(config.hidden, 1)
        )
        matrix = torch.tensor(config.preferences.matrix())
        if config.learn_preferences:
            self.preferences = nn.Parameter(matrix)
        else:  # settings, not weights
            self.register_buffer("preferences", matrix, persistent=False)


class CPAIQA(TrainedModel):
    """CPA-IQA on a contrastive encoder.

    Args:
        config: settings.
        encoder: tower of images, their places, and texts.
        phrases: function from a text to its noun phrases.
        levels: whether the distortion maps read the encoder's `observe` instead of its joint map.
        segmenter: source of regions; None for a regular grid.
        attributes: source of latent attributes; None for the noun phrases.
    """

    name = "cpa_iqa"
    context_names = ("regions",)
    feature_settings = ("side",)
    tower_roles: ClassVar = {"clip": "encoder"}
    assistant_roles = ("segmenter", "attributes")

    def __init__(
        self,
        config: CPAIQAConfig,
        encoder: ContrastiveEncoder,
        *,
        phrases: Callable[[str], list[str]],
        levels: bool,
        segmenter: Segmenter | None = None,
        attributes: AttributeReader | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder: Any = encoder
        self.segmenter, self.attributes = segmenter, attributes
        self._phrases, self._levels = phrases, levels
        self.head = CPAHead(config, self.encoder.level_channels if levels else encoder.width, encoder.width)

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        return {"tokens": self.head.tokens}

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        described["config"]["preferences"] = dict(self.config.preferences)
        return described

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode texts (P, d), their noun phrases and attributes (P, k, d), and masks (P, k) of those that exist."""
        self.encoder.encode_words(texts)  # for its warnings of unread words
        phrases = [self._phrases(text)[: self.config.attributes] for text in texts]
        latent = phrases
        if self.attributes is not None:
            latent = [found[: self.config.attributes] for found in self.attributes.decompose(list(texts))]
        out = {"pooled": self.encoder.encode_text(texts)}
        for name, lists in (("phrases", phrases), ("attributes", latent)):
            out[name], out[f"{name}_mask"] = self._padded(lists)
        return out

    def _padded(self, lists: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """(P, k, d) and a mask; k is fixed, so that a text's row does not depend on the others."""
        flat = self.encoder.encode_text([text for texts in lists for text in texts])
        counts, most = [len(texts) for texts in lists], self.config.attributes
        out = torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in flat.split(counts)])
        return out, torch.arange(most, device=flat.device) < torch.tensor(counts, device=flat.device)[:, None]

    def prepare(self, images: Images, prompts: PromptFeatures | None) -> Context | None:
        """Compute the segmenter's masks (B, R, h, w) of the letterboxed image; None where a grid is used."""
        if self.segmenter is None:
            return None
        return {"regions": self.segmenter.segment(self._view(images)).to(images)}

    def _view(self, images: Images) -> View:
        side = self.config.side if self.encoder.any_size else self.encoder.image_size
        return square_view(images, self.encoder, side)

    def forward_features(self, images: Images, *, generator: Generator | None = None, crops: int | None = None) -> Seen:
        """Compute the joint map `places` (B, d, h, w), `pooled` features (B, d_f), and `tokens` (B, C, h, w)."""
        view = self._view(images)
        if not self._levels:
            places = self.encoder.encode_map(view)
            return {"places": places, "pooled": self.encoder.features(view), "tokens": places}
        features, tokens = self.encoder.observe(view)
        places = self.encoder.project(features.movedim(1, -1)).movedim(-1, 1)
        return {"places": places, "pooled": features.mean(dim=(2, 3)), "tokens": tokens}

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        tokens = self.head.tokens(seen["tokens"])
        maps = self.head.maps(tokens)
        severity = torch.sigmoid(smooth_maximum(maps.flatten(2), dim=2))
        distortion = torch.sigmoid(self.head.tolerance - (F.softplus(self.head.impact) * severity).sum(dim=1))
        statistics = torch.cat([tokens.mean(dim=(2, 3)), tokens.std(dim=(2, 3), unbiased=False)], dim=1)
        low_level = torch.sigmoid(self.head.low_level(statistics))[:, 0]
        logits = self.head.preferences[self.config.preferences.row(self.config.scenario)]
        counted = [i for i, name in enumerate(COMPONENTS[:3]) if name in self.config.tiers]
        details = {"severity": severity, "distortion_maps": torch.sigmoid(maps)}
        fidelity = torch.stack([distortion, low_level], dim=1)
        quality = (fidelity * logits[3:].softmax(dim=0)).sum(dim=1)
        if prompts is None:
            return ModelOutput(quality=quality, correspondence=None, details=details)
        tiers = self._tiers(seen, prompts, context)
        aligned = torch.stack([tiers[COMPONENTS[i]] for i in counted], dim=1)
        correspondence = (aligned * logits[counted].softmax(dim=0)).sum(dim=1)
        details["components"] = torch.cat([torch.stack(list(tiers.values()), dim=1), fidelity], dim=1)
        shares = logits[[*counted, 3, 4]].softmax(dim=0)
        details["score"] = 100 * (torch.cat([aligned, fidelity], dim=1) * shares).sum(dim=1)
        batch, regions = len(quality), context is not None and "regions" in context
        details["substitute_regions"] = torch.full((batch,), not regions, device=quality.device)
        details["substitute_attributes"] = torch.full((batch,), self.attributes is None, device=quality.device)
        return ModelOutput(quality=quality, correspondence=correspondence, details=details)

    def _tiers(self, seen: Seen, prompts: PromptFeatures, context: Context | None) -> dict[str, Tensor]:
        """s_g, s_l and s_i, (B,) each."""
        head, places = self.head, seen["places"]
        image = self.encoder.project(seen["pooled"].to(places.dtype))
        text = prompts.rows("pooled").to(places.dtype)
        phrases, latent = (prompts.rows(name).to(places.dtype) for name in ("phrases", "attributes"))
        cosine = F.cosine_similarity(image, text, dim=1)
        regions, used = self._regions(places, None if context is None else context.get("regions"))
        local = F.normalize(regions, dim=-1) @ F.normalize(phrases, dim=-1).transpose(1, 2)  # (B, R, k)
        best = masked_mean(smooth_maximum(local, 1, used[..., None].expand_as(local)), prompts.rows("phrases_mask"))
        v, t = F.normalize(image, dim=1)[:, None].expand_as(latent), F.normalize(latent, dim=-1)
        present = torch.sigmoid(head.implicit(torch.cat([v, t, v * t * v.shape[-1] ** 0.5], dim=-1)))[..., 0]
        slope, offset = head.slopes, head.offsets
        return {
            "global": torch.sigmoid(slope[0] * (cosine - offset[0])),
            "local": torch.sigmoid(slope[1] * (best - offset[1])),
            "implicit": masked_mean(present, prompts.rows("attributes_mask")),
        }

    def _regions(self, places: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, R, d) under masks or in a grid; (B, R) which are used: without any region all, as zeros."""
        if masks is None:
            grid = min(self.config.grid, places.shape[2]), min(self.config.grid, places.shape[3])
            cells = F.adaptive_avg_pool2d(places, grid).flatten(2).transpose(1, 2)
            return cells, torch.ones(cells.shape[:2], dtype=torch.bool, device=cells.device)
        weights = F.adaptive_avg_pool2d(masks.to(places), (places.shape[2], places.shape[3])).flatten(2)
        used = weights.sum(dim=2) > 0
        regions = weights @ places.flatten(2).transpose(1, 2) / weights.sum(dim=2, keepdim=True).clamp_min(1e-6)
        return regions, used | ~used.any(dim=1, keepdim=True)

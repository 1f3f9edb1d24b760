"""SC-AGIQA: text-assisted semantic alignment and frequency-domain perception of degradations.

TSAM. A description D of the image (by a multimodal language model) and the prompt P are read in sight of the image by
BLIP's text encoder; SCI says how the two agree:

    F_p, F_d = BLIP(P, I), BLIP(D, I),   SCI = mean over tokens of CrossAttention(Q = F_p, K = V = F_d)          (3, 4)

FFDPM. The last blocks of a ViT on crops, fused by 1 x 1 and 3 x 3 convolutions to F_v (5), attend to F_p, the
preference feature; AQAFP pools the result f over the patches:

    S = sigmoid(conv1x1(f)),  C = sigmoid(W_2 relu(W_1 mean(f))),  w = visibility of each patch (see `frequency`)  (6-8)
    VQI = sum_p w_p (f S C)_p / sum_p w_p                                                                          (9)

MoER. h = [VQI; SCI] -> four experts, of which a gate takes three (10); one such head for each aspect. Scores are means
over the crops.

Source: SC-AGIQA (the paper, by equation number). The released code lets F_v attend to the description
(`preference="description"`) and sums the visibility over the batch, which is not kept: rows are independent here.
Our inferences: a mean over the words instead of all 512 places; a residual connection around the attention to F_p;
quality without the prompt (`prompt_in_quality=False`) reads h = [VQI; n] with a trained n in place of SCI, and f = F_v.
Without a language model the description is the prompt itself, a variant trained as such; `details` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward.assistants.base import Captioner
from aigiqa_reward.models.base import FullPrecision, ModelOutput, Seen, Standardize, TrainedModel
from aigiqa_reward.models.blocks import Anchor, CrossAttention, Experts
from aigiqa_reward.models.towers import GroundedTextEncoder, LevelsEncoder, native_crops, square_view
from aigiqa_reward.types import Context, Images, PromptFeatures

PIXELS_PER_DEGREE = 32.0
"""Of visual angle: chosen here, a 512 px image at a width of 16 degrees, about two picture widths away."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601)."""


def contrast_sensitivity(frequency: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """a(v) = 2.6 (0.0192 + 0.114 v) exp(-(0.114 v)^1.1) for v in cycles a degree (Mannos and Sakrison 1974)."""
    scaled = 0.114 * frequency
    return 2.6 * (0.0192 + scaled) * torch.exp(-(scaled**1.1))


def frequency_weights(
    crops: Images, grid: tuple[int, int], *, pixels_per_degree: float = PIXELS_PER_DEGREE
) -> Float[Tensor, "batch places"]:
    """How visible each patch's frequencies are, in (0, 1): the weights w of AQAFP (SC-AGIQA, eq. 8).

    The luminance of each patch goes through a Fourier transform; the amplitudes without the mean, weighted with a(v),
    are averaged to a score; a sigmoid follows. Every row is computed from its own pixels (the released code adds the
    scores over the whole batch, so that every image gets the same map).

    Our inferences: the viewing distance; scores are taken relative to the mean and deviation over the row's own
    patches, since the sigmoid of raw amplitudes is nearly the same everywhere.

    Args:
        crops: (B, 3, S, S) in [0, 1].
        grid: rows and columns of patches, divisors of S; a place of the feature map each.
        pixels_per_degree: of visual angle.

    Returns:
        (B, rows * columns), in reading order; differentiable.
    """
    rows, columns = grid
    height, width = crops.shape[2:]
    if height % rows or width % columns:
        raise ValueError(f"grid: expected divisors of {height} x {width} px, got {rows} x {columns}")
    luma = (crops * crops.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1)
    patches = luma.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3)  # (B, rows, columns, p, q)
    spectrum = torch.fft.fft2(patches, norm="ortho")
    amplitude = (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()
    down, across = (torch.fft.fftfreq(n, device=crops.device, dtype=crops.dtype) for n in patches.shape[3:])
    cycles = torch.hypot(down[:, None], across[None]) * pixels_per_degree
    sensitivity = contrast_sensitivity(cycles)
    sensitivity[0, 0] = 0  # the mean brightness is no contrast
    score = (amplitude * sensitivity).mean(dim=(3, 4)).flatten(1)
    deviation = score.var(dim=1, keepdim=True, unbiased=False).add(1e-8).sqrt()
    return torch.sigmoid((score - score.mean(dim=1, keepdim=True)) / deviation)


@dataclass(frozen=True, kw_only=True)
class SCAGIQAConfig:
    """Settings of SC-AGIQA.

    Attributes:
        width: of F_v, VQI and SCI.
        heads: of both cross-attentions.
        crops: scored and averaged.
        train_crops: drawn at random for each image in training.
        short_side: images smaller than this are looked at as if enlarged to it, in px.
        resolution: larger ones are scaled down to this short side first; None crops at native resolution.
        frequency: "csf", "csf_detached" (no gradient through the spectrum), or "mean" (w = 1, to measure its worth).
        experts: of the regression; 1 measures what a mixture is worth.
        top: experts that answer for an image.
        preference: what F_v attends to, "prompt" (the paper) or "description" (the released code).
        prompt_in_quality: quality reads SCI and F_p as in the paper; it then needs prompts.
        dropout: in the experts and on the words' states.
        anchor: add the similarity of image and prompt to correspondence; for a text encoder whose words and places are
            in one space, as the compact towers' are.
    """

    width: int = 512
    heads: int = 8
    crops: int = 15
    train_crops: int = 3
    short_side: int = 512
    resolution: int | None = None
    frequency: str = "csf"
    experts: int = 4
    top: int = 3
    preference: str = "prompt"
    prompt_in_quality: bool = False
    dropout: float = 0.1
    anchor: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "heads", "crops", "train_crops", "short_side", "experts", "top"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        for name, allowed in {
            "frequency": ("csf", "csf_detached", "mean"),
            "preference": ("prompt", "description"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {self.dropout}")


class AQAFP(FullPrecision):
    """Adaptive quality-aware feature pooling, (B, d, h, w) to (B, d) (eq. 6, 7 and 9)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, 1, 1)
        self.squeeze = nn.Linear(width, max(1, width // 16))  # 512 -> 32 -> 512 in the source
        self.excite = nn.Linear(max(1, width // 16), width)

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """Features modulated by place and channel, pooled with `weights` (B, h w)."""
        place = torch.sigmoid(self.spatial(features))
        channel = torch.sigmoid(self.excite(F.relu(self.squeeze(features.mean(dim=(2, 3))))))
        modulated = (features * place * channel[:, :, None, None]).flatten(2)
        return (modulated * weights[:, None]).sum(dim=2) / weights.sum(dim=1, keepdim=True)


class SCHead(FullPrecision):
    """Everything behind the towers."""

    def __init__(self, config: SCAGIQAConfig, channels: int, grounded: int) -> None:
        super().__init__()
        width = config.width
        self.levels, self.grounded = Standardize(channels, axis=-3), nn.LayerNorm(grounded)
        self.reduce = nn.Conv2d(channels, width, 1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.words = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(grounded, width))
        self.align = CrossAttention(width, width, heads=config.heads)
        self.prefer = CrossAttention(width, width, heads=config.heads)
        self.after = nn.Linear(width, width)
        self.pool = AQAFP(width)
        self.no_prompt = nn.Parameter(torch.zeros(width))
        settings = {"experts": config.experts, "top": min(config.top, config.experts), "dropout": config.dropout}
        self.anchor = Anchor() if config.anchor else None
        self.quality = Experts(2 * width, width, **settings)
        self.correspondence = Experts(2 * width, width, **settings)


class SCAGIQA(TrainedModel):
    """SC-AGIQA on a tower of images, a text encoder that sees the image, and, if given, a captioner.

    Args:
        config: settings.
        vision: tower of the crops.
        text: reads prompt and description in sight of the image.
        captioner: describes images; None lets the prompt stand for the description.
    """

    name = "sc_agiqa"
    context_names = ("description", "description_mask")
    crop_features = ("levels", "weights")
    feature_settings = ("crops", "short_side", "resolution")

    def __init__(
        self,
        config: SCAGIQAConfig,
        vision: LevelsEncoder,
        text: GroundedTextEncoder | None = None,
        captioner: Captioner | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision, self.text, self.captioner = vision, text, captioner
        self.needs_prompts = config.prompt_in_quality
        self.head = SCHead(config, vision.level_channels, self._reader.grounded_width)

    @property
    def _reader(self) -> Any:
        """The tower that reads texts in sight of the image: BLIP, or the compact towers, which do both."""
        return self.vision if self.text is None else self.text

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        """The blocks' maps come on scales of their own."""
        return {"levels": self.head.levels}

    def start_at(self, quality: float, correspondence: float) -> None:
        """Set the biases of all experts."""
        for experts, mean in ((self.head.quality, quality), (self.head.correspondence, correspondence)):
            experts.start_at(mean)

    def describe(self) -> dict[str, Any]:
        """Settings and towers; the captioner is not part of a saved reward."""
        towers = {"vision": self.vision.describe(), "text": None if self.text is None else self.text.describe()}
        assistants = [] if self.captioner is None else ["captioner"]
        return {"config": asdict(self.config), "towers": towers, "assistants": assistants}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder reads: `text` (P, L, ...) and `mask` (P, L)."""
        return self._reader.read(texts)

    def prepare(self, images: Images, prompts: PromptFeatures | None) -> Context | None:
        """The captioner's descriptions, as the text encoder reads them; None where the prompt stands for them."""
        if self.captioner is None or prompts is None:
            return None
        read = self._reader.read(self.captioner.describe(images))
        return {"description": read["text"], "description_mask": read["mask"]}

    def forward_features(
        self, images: Images, *, generator: torch.Generator | None = None, crops: int | None = None
    ) -> Seen:
        """Maps of the crops `levels` (B, N, C, h, w), their visibility `weights` (B, N, h w), and `whole` (B, T, v)."""
        config = self.config
        count = crops or (config.crops if generator is None else config.train_crops)
        batch = native_crops(
            images,
            self.vision.image_size,
            count,
            short_side=config.short_side,
            resolution=config.resolution,
            generator=generator,
        )
        flat = batch.flatten(0, 1)
        levels = self.vision.levels(flat)
        rows, columns = levels.shape[2:]
        pixels = flat.detach() if config.frequency == "csf_detached" else flat
        weights = frequency_weights(pixels, (rows, columns))
        whole = square_view(images, self._reader, self._reader.image_size)
        return {
            "levels": levels.unflatten(0, batch.shape[:2]),
            "weights": weights.unflatten(0, batch.shape[:2]),
            "whole": self._reader.look(whole),
        }

    def digest(self, seen: Seen) -> Seen:
        """Adds `visual`, F_v of each crop (B N, d, h, w)."""
        levels = self.head.levels(seen["levels"]).flatten(0, 1)
        return {**seen, "visual": self.head.mix(F.relu(self.head.reduce(levels)))}

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        """One quality for each crop and one correspondence, averaged over the crops."""
        head, batch, count = self.head, *seen["levels"].shape[:2]
        weights = torch.ones_like(seen["weights"]) if self.config.frequency == "mean" else seen["weights"]
        visual = (seen if "visual" in seen else self.digest(seen))["visual"]
        weights = weights.flatten(0, 1)
        alone = head.no_prompt.expand(batch * count, -1)
        details = {"frequency_weights": weights.unflatten(0, (batch, count))}
        if prompts is None:
            scores, experts = head.quality(torch.cat([head.pool(visual, weights), alone], dim=1))
            details |= self._by_crop(scores, experts, batch)
            return ModelOutput(quality=details["crop_quality"].mean(dim=1), correspondence=None, details=details)
        consistency, preference, mask = self._align(seen["whole"], prompts, context)
        repeated = [part.repeat_interleave(count, dim=0) for part in (consistency, preference, mask)]
        places = visual.flatten(2).transpose(1, 2)
        preferred = places + head.after(head.prefer(places, *repeated[1:]))
        information = head.pool(preferred.transpose(1, 2).unflatten(2, visual.shape[2:]), weights)
        with_prompt = torch.cat([information, repeated[0]], dim=1)
        if self.config.prompt_in_quality:
            scores, experts = head.quality(with_prompt)
        else:
            scores, experts = head.quality(torch.cat([head.pool(visual, weights), alone], dim=1))
        details |= self._by_crop(scores, experts, batch)
        correspondence = head.correspondence(with_prompt)[0].unflatten(0, (batch, count)).mean(dim=1)
        if head.anchor is not None:
            image, text = seen["whole"].mean(dim=1), prompts.rows("text").to(correspondence.dtype)
            kept = prompts.rows("mask")[..., None].to(text.dtype)
            added, details["similarity"] = head.anchor(image, (text * kept).sum(dim=1) / kept.sum(dim=1))
            correspondence = correspondence + added
        substitute = context is None or "description" not in context
        details["substitute_description"] = torch.full((batch,), substitute, device=scores.device)
        return ModelOutput(quality=details["crop_quality"].mean(dim=1), correspondence=correspondence, details=details)

    def _align(self, whole: Tensor, prompts: PromptFeatures, context: Context | None) -> tuple[Tensor, Tensor, Tensor]:
        """SCI (B, d), and the preference feature (B, L, d) with its mask."""
        text, mask = prompts.rows("text"), prompts.rows("mask")
        asked = self._grounded(whole, text, mask)
        described, described_mask = asked, mask
        if context is not None and "description" in context:
            described_mask = context["description_mask"]
            described = self._grounded(whole, context["description"], described_mask)
        agreed = self.head.align(asked, described, described_mask)
        kept = mask[..., None].to(agreed.dtype)
        consistency = (agreed * kept).sum(dim=1) / kept.sum(dim=1)
        if self.config.preference == "description":
            return consistency, described, described_mask
        return consistency, asked, mask

    def _grounded(self, whole: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        text = text.to(whole.dtype) if text.is_floating_point() else text
        return self.head.words(self.head.grounded(self._reader.ground(whole, text, mask)))

    @staticmethod
    def _by_crop(scores: Tensor, experts: Tensor, batch: int) -> dict[str, Tensor]:
        return {
            "crop_quality": scores.unflatten(0, (batch, -1)),
            "experts": experts.unflatten(0, (batch, -1)).mean(dim=1),
        }

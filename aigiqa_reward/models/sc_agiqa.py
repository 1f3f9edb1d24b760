"""SC-AGIQA: text-assisted semantic alignment and frequency-domain perception of degradations.

TSAM. BLIP's text encoder reads a description D of the image (by a multimodal language model) and the prompt P with
attention to the image; SCI measures how the two agree:

    F_p, F_d = BLIP(P, I), BLIP(D, I),   SCI = mean over tokens of CrossAttention(Q = F_p, K = V = F_d)          (3, 4)

FFDPM. The last blocks of a ViT on crops, fused by 1 x 1 and 3 x 3 convolutions to F_v (5), attend to F_p, the
preference feature; AQAFP pools the result f over the patches:

    S = sigmoid(conv1x1(f)),  C = sigmoid(W_2 relu(W_1 mean(f))),  w = visibility of each patch (see `frequency`)  (6-8)
    VQI = sum_p w_p (f S C)_p / sum_p w_p                                                                          (9)

MoER. h = [VQI; SCI] -> four experts, of which a gate takes three (10); one such head per aspect. Scores are means over
the crops.

Source: SC-AGIQA (the paper, by equation number). The released code lets F_v attend to the description
(`preference="description"`) and sums the visibility over the batch, which is not kept: rows are independent here.
Our inferences: a mean over the words instead of all 512 places; a residual connection around the attention to F_p;
quality without the prompt (`prompt_in_quality=False`) reads h = [VQI; n] with a trained n in place of SCI, and f = F_v.
Without a language model the description is the prompt itself, a variant trained as such and marked in `details`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from aigiqa_reward.assistants.base import Captioner
from aigiqa_reward.models.base import FullPrecision, ModelOutput, Seen, Standardize, TrainedModel
from aigiqa_reward.models.blocks import Anchor, CrossAttention, Experts, masked_mean
from aigiqa_reward.models.towers import CropsConfig, GroundedTextEncoder, LevelsEncoder, native_crops, square_view
from aigiqa_reward.types import Context, Images, PromptFeatures

PIXELS_PER_DEGREE = 32.0  # a 512 px image is 16 degrees wide, about two picture widths away (our inference)
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def contrast_sensitivity(frequency: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Compute a(v) = 2.6 (0.0192 + 0.114 v) exp(-(0.114 v)^1.1), v in cycles per degree (Mannos and Sakrison 1974)."""
    scaled = 0.114 * frequency
    return 2.6 * (0.0192 + scaled) * torch.exp(-(scaled**1.1))


def frequency_weights(
    crops: Images, grid: tuple[int, int], *, pixels_per_degree: float = PIXELS_PER_DEGREE
) -> Float[Tensor, "batch places"]:
    """Compute the visibility in (0, 1) of the frequencies in each patch of a grid, in reading order (eq. 8).

    The luminance of each patch is Fourier transformed; the amplitudes without the mean, weighted by a(v), are averaged
    to a score; a sigmoid follows. Our inferences: the viewing distance, and that scores are standardized over the row's
    patches, since the sigmoid of raw amplitudes is nearly constant.
    """
    rows, columns = grid
    luma = (crops * crops.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1)
    patches = luma.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3)  # (B, rows, columns, p, q)
    spectrum = torch.fft.fft2(patches, norm="ortho")
    amplitude = (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()
    down, across = (torch.fft.fftfreq(n, device=crops.device, dtype=crops.dtype) for n in patches.shape[3:])
    cycles = torch.hypot(down[:, None], across[None]) * pixels_per_degree
    sensitivity = contrast_sensitivity(cycles)
    sensitivity[0, 0] = 0  # mean brightness is not contrast
    score = (amplitude * sensitivity).mean(dim=(3, 4)).flatten(1)
    deviation = score.var(dim=1, keepdim=True, unbiased=False).add(1e-8).sqrt()
    return torch.sigmoid((score - score.mean(dim=1, keepdim=True)) / deviation)


@dataclass(frozen=True, kw_only=True)
class SCAGIQAConfig(CropsConfig):
    """Settings of SC-AGIQA.

    Attributes:
        width: width of F_v, VQI and SCI.
        heads: heads of both cross-attentions.
        frequency: "csf", "csf_detached" (no gradient through the spectrum), or "mean" (w = 1) as an ablation.
        experts: experts of the regression; 1 is the ablation without a mixture.
        top: experts taken per image.
        preference: memory of F_v's attention, "prompt" (the paper) or "description" (the released code).
        prompt_in_quality: whether quality reads SCI and F_p as in the paper; it then needs prompts.
        dropout: dropout of the experts and of the words' states.
        anchor: whether the similarity of image and prompt is added to correspondence, for joint spaces.
    """

    width: int = 512
    heads: int = 8
    train_crops: int = 3
    frequency: Literal["csf", "csf_detached", "mean"] = "csf"
    experts: int = 4
    top: int = 3
    preference: Literal["prompt", "description"] = "prompt"
    prompt_in_quality: bool = False
    dropout: float = 0.1
    anchor: bool = False


class AQAFP(FullPrecision):
    """Adaptive quality-aware feature pooling, (B, d, h, w) to (B, d) (eq. 6, 7 and 9)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, 1, 1)
        self.squeeze = nn.Linear(width, max(1, width // 16))  # 512 -> 32 -> 512 in the source
        self.excite = nn.Linear(max(1, width // 16), width)

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
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
    """SC-AGIQA on an image tower, an image-grounded text encoder, and optionally a captioner.

    Args:
        config: settings.
        vision: tower of the crops.
        text: text encoder of prompt and description; None for `vision`, the compact towers.
        captioner: source of the description; None for the prompt instead.
    """

    name = "sc_agiqa"
    context_names = ("description", "description_mask")
    crop_features = ("levels", "weights")
    feature_settings = ("crops", "short_side", "resolution")
    tower_roles: ClassVar = {"vision": "vision", "text": "text"}
    assistant_roles = ("captioner",)

    def __init__(
        self,
        config: SCAGIQAConfig,
        vision: LevelsEncoder,
        text: GroundedTextEncoder | None = None,
        captioner: Captioner | None = None,
    ) -> None:
        super().__init__()
        self.config, self.vision, self.text, self.captioner = config, vision, text, captioner
        self.needs_prompts = config.prompt_in_quality
        self.head = SCHead(config, vision.level_channels, self._reader.grounded_width)

    @property
    def _reader(self) -> Any:
        return self.vision if self.text is None else self.text

    @property
    def standardized(self) -> Mapping[str, Standardize]:
        return {"levels": self.head.levels}

    def start_at(self, quality: float, correspondence: float) -> None:
        self.head.quality.start_at(quality)
        self.head.correspondence.start_at(correspondence)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Read texts: `text` (P, L, ...) and `mask` (P, L)."""
        return self._reader.read(texts)

    def prepare(self, images: Images, prompts: PromptFeatures | None) -> Context | None:
        """Read the captioner's descriptions; None where the prompt replaces them."""
        if self.captioner is None or prompts is None:
            return None
        read = self._reader.read(self.captioner.describe(images))
        return {"description": read["text"], "description_mask": read["mask"]}

    def forward_features(self, images: Images, *, generator: Generator | None = None, crops: int | None = None) -> Seen:
        """Compute `levels` (B, N, C, h, w) and visibility `weights` (B, N, h w) of the crops, and `whole` (B, T, v)."""
        crops_of = native_crops(images, self.vision.image_size, self.config, generator=generator, crops=crops)
        flat = crops_of.flatten(0, 1)
        levels = self.vision.levels(flat)
        rows, columns = levels.shape[2:]
        weights = frequency_weights(flat.detach() if self.config.frequency == "csf_detached" else flat, (rows, columns))
        return {
            "levels": levels.unflatten(0, crops_of.shape[:2]),
            "weights": weights.unflatten(0, crops_of.shape[:2]),
            "whole": self._reader.look(square_view(images, self._reader, self._reader.image_size)),
        }

    def digest(self, seen: Seen) -> Seen:
        """Add `visual`, F_v of each crop (B N, d, h, w)."""
        levels = self.head.levels(seen["levels"]).flatten(0, 1)
        return {**seen, "visual": self.head.mix(F.relu(self.head.reduce(levels)))}

    def forward_head(self, seen: Seen, prompts: PromptFeatures | None, context: Context | None) -> ModelOutput:
        head, batch, count = self.head, *seen["levels"].shape[:2]
        weights = torch.ones_like(seen["weights"]) if self.config.frequency == "mean" else seen["weights"]
        details = {"frequency_weights": weights}
        visual = (seen if "visual" in seen else self.digest(seen))["visual"]
        weights = weights.flatten(0, 1)
        read = visual.new_zeros(0)
        if prompts is not None:
            consistency, preference, mask = (
                part.repeat_interleave(count, dim=0) for part in self._align(seen["whole"], prompts, context)
            )
            places = visual.flatten(2).transpose(1, 2)
            preferred = places + head.after(head.prefer(places, preference, mask))
            information = head.pool(preferred.transpose(1, 2).unflatten(2, visual.shape[2:]), weights)
            read = torch.cat([information, consistency], dim=1)
        if prompts is not None and self.config.prompt_in_quality:
            scores, experts = head.quality(read)
        else:
            alone = head.no_prompt.expand(batch * count, -1)
            scores, experts = head.quality(torch.cat([head.pool(visual, weights), alone], dim=1))
        details["crop_quality"] = scores.unflatten(0, (batch, count))
        details["experts"] = experts.unflatten(0, (batch, count)).mean(dim=1)
        quality = details["crop_quality"].mean(dim=1)
        if prompts is None:
            return ModelOutput(quality=quality, correspondence=None, details=details)
        correspondence = head.correspondence(read)[0].unflatten(0, (batch, count)).mean(dim=1)
        if head.anchor is not None:
            text = masked_mean(prompts.rows("text").to(correspondence.dtype), prompts.rows("mask"))
            added, details["similarity"] = head.anchor(seen["whole"].mean(dim=1), text)
            correspondence = correspondence + added
        substitute = context is None or "description" not in context
        details["substitute_description"] = torch.full((batch,), substitute, device=scores.device)
        return ModelOutput(quality=quality, correspondence=correspondence, details=details)

    def _align(self, whole: Tensor, prompts: PromptFeatures, context: Context | None) -> tuple[Tensor, Tensor, Tensor]:
        """SCI (B, d), and the preference feature (B, L, d) with its mask."""
        mask = prompts.rows("mask")
        asked = self._grounded(whole, prompts.rows("text"), mask)
        described, described_mask = asked, mask
        if context is not None and "description" in context:
            described_mask = context["description_mask"]
            described = self._grounded(whole, context["description"], described_mask)
        consistency = masked_mean(self.head.align(asked, described, described_mask), mask)
        if self.config.preference == "description":
            return consistency, described, described_mask
        return consistency, asked, mask

    def _grounded(self, whole: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        text = text.to(whole.dtype) if text.is_floating_point() else text
        return self.head.words(self.head.grounded(self._reader.ground(whole, text, mask)))

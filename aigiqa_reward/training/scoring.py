"""The forward pass of a training, and predictions over many images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.training.live import LiveImages
from aigiqa_reward.training.store import FeatureStore
from aigiqa_reward.types import PromptFeatures

PREDICTED_TOGETHER = 32
"""Images judged in one step of a prediction."""


class Scoring(nn.Module):
    """A model's `judge` with tensors in and out, which is what wrappers for several processes can pass on."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        seen: Mapping[str, Tensor],
        context: Mapping[str, Tensor] | None,
        texts: Mapping[str, Tensor],
        index: Tensor,
        wrong: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Quality, correspondence, correspondence to the wrong prompts, and the model's own penalty."""
        features = PromptFeatures(texts=("",) * len(next(iter(texts.values()))), index=index, tensors=texts, model="")
        seen = self.model.digest(seen)
        output = self.model.judge(seen, features, context)
        other = None
        if wrong is not None and output.correspondence is not None:
            features = PromptFeatures(texts=features.texts, index=wrong, tensors=texts, model="")
            other = self.model.judge(seen, features, context).correspondence
        penalty = output.details.get("penalty")
        return (
            output.quality,
            output.correspondence,
            other,
            output.quality.new_zeros(()) if penalty is None else penalty.mean(),
        )


def predict(
    model: TrainedModel,
    prompts: Sequence[str],
    source: FeatureStore | LiveImages,
    rows: np.ndarray,
    *,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Raw scores of rows, (M,) each; correspondence to `prompts[row]`, or None where the model has none."""
    quality, correspondence = predict_against(model, [prompts], source, rows, progress=progress)
    return quality, None if correspondence is None else correspondence[:, 0]


@torch.no_grad()
def predict_against(
    model: TrainedModel,
    prompts: Sequence[Sequence[str]],
    source: FeatureStore | LiveImages,
    rows: np.ndarray,
    *,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Raw quality of rows (M,), and correspondence (M, K) to each of K prompts of every row.

    Args:
        model: left in evaluation mode.
        prompts: K lists, each with a prompt of every image.
        source: features or images.
        rows: which images.
        progress: show a bar on stderr.
    """
    model.eval()
    device = next(model.parameters()).device
    quality: list[Tensor] = []
    correspondence: list[Tensor] = []
    features = [model.encode_prompts([texts[int(row)] for row in rows]) for texts in prompts]
    starts = range(0, len(rows), PREDICTED_TOGETHER)
    for start in tqdm(starts, desc="predict", unit="batch", disable=not progress, leave=False):
        part = rows[start : start + PREDICTED_TOGETHER]
        seen, context = source.look(model, part, device)
        seen = model.digest(seen)
        outputs = [model.judge(seen, texts[start : start + len(part)], context) for texts in features]
        quality.append(outputs[0].quality.float().cpu())
        found = [output.correspondence.float().cpu() for output in outputs if output.correspondence is not None]
        if found:
            correspondence.append(torch.stack(found, dim=1))
    return torch.cat(quality).numpy(), torch.cat(correspondence).numpy() if correspondence else None

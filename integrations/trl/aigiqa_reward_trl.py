"""Prompt optimization with trl's GRPOTrainer: rewrites of prompts, scored by the images that they make.

    from aigiqa_reward import create_reward
    from aigiqa_reward.sampling import PromptScorer
    from aigiqa_reward_trl import RewriteReward

    scorer = PromptScorer(pipe, create_reward("compact"), batch_size=8, num_inference_steps=20)
    trainer = GRPOTrainer(model, reward_funcs=RewriteReward(scorer), train_dataset=dataset, args=config)

Each row of the dataset has `prompt`, the request for a rewrite, and `original`, the prompt to rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from aigiqa_reward.sampling import PromptScore, PromptScorer

__all__ = ["RewriteReward"]


class RewriteReward:
    """Reward function for GRPOTrainer: the completion is a rewrite, and the score of its image is the reward.

    Correspondence is scored against the original prompt, so a rewrite gains nothing by asking for something easier.
    All rewrites of a step share their noise. With several processes, each has its own pipeline, reward and cache of
    scores, and scores its own completions. Rewards are totals of the reward, or
      - `floor` for a rewrite that is blank, that the reward cannot read where it has to, or whose images the safety
        checker of the pipeline blanked;
      - None, which trl leaves out of the group, if no image could be scored for another reason (NaN pixels).

    Args:
        scorer: Pipeline, reward and sampling settings.
        original_column: Column of the dataset with the original prompt.
        judged_by: Prompt to score images against: "original" or "rewrite".
        compose: Function f(original, completion) -> rewrite; the result is stripped. By default the completion itself.
        floor: Reward of such rewrites; None leaves them out. 0 is the low end of an embedded Reward's scale; where
            totals may be negative (z-scores of a CompositeReward, imagereward, siglip2, hpsv3), pass a number below all
            of them.
        seed: Seed of the first image of every rewrite.
        fresh_noise: Whether every step has other seeds, so that the language model cannot adapt to one noise. Scores
            are then cached within a step only.
        name: Name under which trl logs the reward.
    """

    def __init__(
        self,
        scorer: PromptScorer,
        *,
        original_column: str = "original",
        judged_by: Literal["original", "rewrite"] = "original",
        compose: Callable[[str, str], str] | None = None,
        floor: float | None = 0.0,
        seed: int = 0,
        fresh_noise: bool = False,
        name: str = "image_reward",
    ) -> None:
        if not isinstance(scorer, PromptScorer):
            raise TypeError(f"scorer: expected a PromptScorer(pipe, reward, ...), got {type(scorer).__name__}")
        if judged_by not in ("original", "rewrite"):
            raise ValueError(f"judged_by: expected 'original' or 'rewrite', got {judged_by!r}")
        self.scorer, self.original_column, self.judged_by, self.compose = scorer, original_column, judged_by, compose
        self.floor, self.seed, self.fresh_noise, self.__name__ = floor, seed, fresh_noise, name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score N completions, as called by GRPOTrainer.

        Args:
            prompts: (N,) not used.
            completions: (N,) texts, or conversations whose last assistant message is the completion.
            completion_ids: Not used.
            trainer_state: State whose `global_step` selects the noise with `fresh_noise`.
            log_extra: Receives columns for trl's table of completions: original, rewrite, quality, correspondence.
            log_metric: Receives, as rewrite/NAME, mean quality and correspondence, and the shares of rewrites that were
                blank or unreadable, dropped (NaN or flagged), and cached.
            **columns: Other columns of the dataset, (N,) each; `original_column` is used.
        """
        del prompts, completion_ids
        originals = self._originals(columns)
        compose = self.compose or (lambda original, completion: completion)
        texts = [_text_of(completion) for completion in completions]
        rewrites = [compose(*pair).strip() for pair in zip(originals, texts, strict=True)]
        scores = self._scores(originals, rewrites, trainer_state)
        if log_extra is not None:
            log_extra("original", originals)
            log_extra("rewrite", rewrites)
            for name in ("quality", "correspondence"):
                log_extra(name, [score and getattr(score, name) for score in scores])
        if log_metric is not None:
            for name, value in _metrics(scores).items():
                log_metric(f"rewrite/{name}", value)
        return [
            self.floor if score is None or score.flagged else None if score.dropped else score.total for score in scores
        ]

    def _originals(self, columns: dict[str, Any]) -> list[str]:
        originals = columns.get(self.original_column)
        if originals is None:
            raise ValueError(
                f"original_column: expected a column {self.original_column!r} in the dataset, got {sorted(columns)}; "
                "add the original prompts, name their column, and keep remove_unused_columns=False"
            )
        for row, original in enumerate(originals):
            if not isinstance(original, str):
                raise TypeError(f"{self.original_column}[{row}]: expected a text, got {type(original).__name__}")
        return list(originals)

    def _scores(self, originals: list[str], rewrites: list[str], trainer_state: Any) -> list[PromptScore | None]:
        """Scores, None for a rewrite that is blank or cannot be read where images are scored against it."""
        written = [row for row, rewrite in enumerate(rewrites) if rewrite]
        if self.judged_by == "rewrite":
            unread = self.scorer.unreadable([rewrites[row] for row in written])
            written = [row for row in written if rewrites[row] not in unread]
        if not written:
            return [None] * len(rewrites)
        step = getattr(trainer_state, "global_step", 0) if self.fresh_noise else 0
        texts = originals if self.judged_by == "original" else rewrites
        scores = self.scorer.score(
            [rewrites[row] for row in written],
            [texts[row] for row in written],
            seed=self.seed + step * self.scorer.seeds_per_prompt,
        )
        by_row = dict(zip(written, scores, strict=True))
        return [by_row.get(row) for row in range(len(rewrites))]


def _metrics(scores: Sequence[PromptScore | None]) -> dict[str, float]:
    """Metrics with the same names on every process, which trl requires; NaN, which it leaves out, for none."""
    made = [score for score in scores if score is not None]
    judged = [score for score in made if score.dropped is None]
    return {
        "quality": _mean(score.quality for score in judged if score.quality is not None),
        "correspondence": _mean(score.correspondence for score in judged if score.correspondence is not None),
        "blank": _mean(float(score is None) for score in scores),
        "dropped": _mean(float(score.dropped is not None) for score in made),
        "cached": _mean(float(score.cached) for score in made),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def _text_of(completion: Any) -> str:
    if isinstance(completion, list | tuple):
        said = [message for message in completion if message.get("role") == "assistant"]
        completion = said[-1].get("content") if said else None
        if isinstance(completion, list | tuple):
            completion = "".join(part.get("text", "") for part in completion if part.get("type") == "text")
    if completion is not None and not isinstance(completion, str):
        raise TypeError(f"completions: expected texts or conversations, got {type(completion).__name__}")
    return completion or ""

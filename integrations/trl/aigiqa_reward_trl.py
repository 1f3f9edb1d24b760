"""Prompt optimization with trl's GRPOTrainer: rewrites of prompts, judged by the images that they make.

    from aigiqa_reward import create_reward
    from aigiqa_reward.sampling import PromptScorer
    from aigiqa_reward_trl import RewriteReward

    scorer = PromptScorer(pipe, create_reward("compact"), batch_size=8, num_inference_steps=20)
    trainer = GRPOTrainer(model, reward_funcs=RewriteReward(scorer), train_dataset=dataset, args=config)

Each row of the dataset holds `prompt`, which asks the language model for a rewrite, and `original`, the prompt that is
to be rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from aigiqa_reward.sampling import PromptScore, PromptScorer

__all__ = ["RewriteReward"]


class RewriteReward:
    """A reward function for GRPOTrainer: the language model's completion is a rewrite, its image is the reward.

    Correspondence is judged against the original prompt, so that a rewrite cannot earn by asking for something easier.
    All rewrites of a step share their noise. Under several processes each has its own pipeline, reward and memory of
    scores, and judges its own completions; trl puts them together.

    Rewards are totals of the reward, or
      - `floor` for a rewrite that is blank, or that is to judge and holds no word that the reward can read, or whose
        images the pipeline's safety checker blanked: it is at fault;
      - None, which trl leaves out of the group, where no image could be judged for another reason (NaN pixels).

    Args:
        scorer: pipeline, reward, steps, number of images: how a prompt is judged.
        original_column: the dataset's column that holds the original prompt.
        judged_by: "original", or "rewrite" to hold the images against the rewrite itself.
        compose: `f(original, completion) -> rewrite`, then stripped; by default the completion. For a language model
            that thinks aloud, puts the prompt in quotes, or is to add words only.
        floor: see above; None leaves such rewrites out as well. 0 is the low end of a Reward's scale; give a
            CompositeReward, whose zscores center on 0, a number below all that it gives.
        seed: of every rewrite's first image.
        fresh_noise: whether every step has other seeds. Then the language model cannot learn what suits one noise,
            and a rewrite is remembered within a step only.
        name: what trl logs the reward by.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an unknown `judged_by`.
    """

    def __init__(
        self,
        scorer: PromptScorer,
        *,
        original_column: str = "original",
        judged_by: str = "original",
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
        if compose is not None and not callable(compose):
            raise TypeError(f"compose: expected f(original, completion) -> rewrite, got {type(compose).__name__}")
        self.scorer = scorer
        self.original_column = original_column
        self.judged_by = judged_by
        self.compose = compose
        self.floor = floor
        self.seed = seed
        self.fresh_noise = fresh_noise
        self.__name__ = name

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
        """Judge N completions, as GRPOTrainer calls it.

        Args:
            prompts: (N,) what the language model was asked; not looked at.
            completions: (N,) texts, or conversations whose last assistant's message is the completion.
            completion_ids: not looked at.
            trainer_state: its `global_step` chooses the noise with `fresh_noise`.
            log_extra: takes the columns original, rewrite, quality, correspondence for trl's table of completions.
            log_metric: takes the means of quality and correspondence over the judged, and the shares of rewrites that
                were blank or unreadable, dropped or flagged, and cached, all as rewrite/NAME.
            **columns: the dataset's other columns, (N,) each; `original_column` is used.

        Raises:
            TypeError: an original or a completion that is no text.
            ValueError: no column of this name, or originals that are blank or hold no word that the reward can read.
        """
        del prompts, completion_ids
        originals = self._originals(columns, len(completions))
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
            for name, value in _metrics(scores):  # the same names on every process, which trl needs
                log_metric(f"rewrite/{name}", value)
        return [self._reward_of(score) for score in scores]

    def _originals(self, columns: dict[str, Any], count: int) -> list[str]:
        originals = columns.get(self.original_column)
        if originals is None:
            raise ValueError(
                f"original_column: the dataset has no column {self.original_column!r}, it gives {sorted(columns)}; add "
                "the original prompts to it, name their column, and keep remove_unused_columns=False"
            )
        for row, original in enumerate(originals):
            if not isinstance(original, str):
                raise TypeError(f"{self.original_column}[{row}]: expected a text, got {type(original).__name__}")
        assert len(originals) == count, "trl gives every completion its row"
        return list(originals)

    def _scores(self, originals: list[str], rewrites: list[str], trainer_state: Any) -> list[PromptScore | None]:
        """None for a rewrite that is blank, or cannot be read where it judges."""
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

    def _reward_of(self, score: PromptScore | None) -> float | None:
        if score is None or score.flagged:
            return self.floor
        return None if score.dropped else score.total


def _metrics(scores: Sequence[PromptScore | None]) -> Iterable[tuple[str, float]]:
    made = [score for score in scores if score is not None]
    judged = [score for score in made if score.dropped is None]
    yield "quality", _mean(score.quality for score in judged)
    yield "correspondence", _mean(score.correspondence for score in judged if score.correspondence is not None)
    yield "blank", _mean(float(score is None) for score in scores)
    yield "dropped", _mean(float(score.dropped is not None) for score in made)
    yield "cached", _mean(float(score.cached) for score in made)


def _mean(values: Iterable[float]) -> float:
    """NaN of none, which trl leaves out."""
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

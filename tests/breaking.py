"""A reward that counts what it scored, and fails on a given prompt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Breaking:
    """Scores by `score`, (B, 3, H, W) to (B,), until it comes to a prompt."""

    def __init__(
        self,
        name: str,
        score: Callable[[Tensor], Tensor],
        fails_on: str = "",
        error: type[BaseException] = RuntimeError,
    ) -> None:
        self.name = name
        self.prompts: list[str] = []
        self._score, self._fails_on, self._error = score, fails_on, error

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        if prompts[0] == self._fails_on:
            raise self._error("broken")
        self.prompts += prompts
        return self._score(images)

"""A reward that records the prompts it scored, and raises at a given one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Breaking:
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

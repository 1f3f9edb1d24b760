"""Calls of a diffusers pipeline: its arguments, its images, chunks that fit into memory, prompts encoded once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from aigiqa_reward import images as pixels

Item = TypeVar("Item")
Result = TypeVar("Result")


def takes(pipe: Callable[..., Any], argument: str) -> bool:
    """Return whether a pipeline's call has an argument of this name."""
    try:
        return argument in inspect.signature(pipe).parameters
    except ValueError:  # a callable without a signature
        return False


def generators_of(seeds: Sequence[int]) -> torch.Generator | list[torch.Generator]:
    """Return one generator on the CPU per seed, as a pipeline takes them: a single one without a list."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def images_of(result: Any, count: int) -> tuple[Tensor, list[bool]]:
    """Return the `count` images (B, 3, H, W) of a pipeline's output, and whether its safety checker flagged them."""
    images = getattr(result, "images", None)
    if not isinstance(images, Tensor):
        raise TypeError(
            "pipe: expected an output whose .images is a tensor, as output_type='pt' asks for, got "
            f"{type(result).__name__} with {type(images).__name__}; "
            "pass a diffusers pipeline that makes images"
        )
    pixels.check(images, validate=False, argument="the pipeline's images")
    if images.shape[0] != count:
        raise ValueError(
            f"pipe: expected {count} images for {count} generators, got {images.shape[0]}; "
            "pass a pipeline that makes one image for each"
        )
    return images, getattr(result, "nsfw_content_detected", None) or [False] * count


def check_pipe_kwargs(pipe_kwargs: Mapping[str, Any], owner: str, owned: Mapping[str, str]) -> None:
    """Refuse embeddings of several prompts, and arguments that the `owner` sets; `owned` has them with the remedies."""
    for name, value in pipe_kwargs.items():
        if name in owned:
            raise ValueError(f"{name}: {owner} sets this argument of the pipeline itself; {owned[name]}")
        if name.endswith("prompt_embeds") and isinstance(value, Tensor) and value.shape[0] != 1:
            raise ValueError(
                f"{name}: expected embeddings of one prompt, (1, ...), got shape {tuple(value.shape)}; "
                "pass one prompt per call: loop"
            )


# --------------------------------------------------------------------------------------------- chunks

NO_MEMORY = (
    "not even one candidate fits into memory. Sample smaller images (height=, width=), load the "
    "pipeline in half precision, call pipe.enable_model_cpu_offload() or pipe.vae.enable_tiling(), or move "
    "the reward to the CPU (reward.to('cpu'))"
)


def in_chunks(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], Result], pipe: Any
) -> Generator[tuple[Sequence[Item], Result], None, None]:
    """Work on consecutive items together, and yield each chunk with its result.

    A chunk that runs out of memory is halved and repeated, after the pipeline was offloaded, and later ones are no
    larger. If not even one item fits, the torch.OutOfMemoryError is raised with remedies.
    """
    while items:
        chunk = items[:size]
        try:
            result = work(chunk)
        except torch.OutOfMemoryError as error:
            if len(chunk) == 1:
                error.add_note(NO_MEMORY)
                raise
            size = len(chunk) // 2
        else:
            items = items[size:]
            yield chunk, result
            continue
        # Outside the except block, so that the error no longer holds the failed chunk's tensors.
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()  # offloads, as the pipeline does at the end of a call
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------- prompts encoded once

_COUNT = "num_images_per_prompt"

_REMEMBERED = 16
"""Encodings kept: a pipeline makes one or two (positive, negative), but one that gets new tensors in every call (an
image as part of the prompt) would fill the memory."""


class PromptMemo:
    """Keeps what a pipeline's `encode_prompt` returned over several calls of the pipeline.

    While `installed`, an instance attribute replaces the method; components, offloading hooks and compiled modules are
    not touched. The prompt is encoded for one image, and the encoding is then repeated for the call's number of images,
    as pipelines do it themselves; where that is not known to be right, the method runs once per set of arguments.

    Args:
        pipe: any pipeline; one without `encode_prompt` is not changed.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._known: dict[Any, tuple[Any, Any]] = {}  # key -> (arguments, kept alive for their ids; encoding)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Use kept encodings within this block; afterwards the pipeline is as it was."""
        original = getattr(self._pipe, "encode_prompt", None)
        if not callable(original) or not hasattr(self._pipe, "__dict__"):
            yield
            return
        missing = object()
        before = vars(self._pipe).get("encode_prompt", missing)
        self._pipe.encode_prompt = self._remembering(original)
        try:
            yield
        finally:
            if before is missing:
                del self._pipe.encode_prompt
            else:
                self._pipe.encode_prompt = before

    def _remembering(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            count = bound.arguments.get(_COUNT)
            if isinstance(count, int) and count > 1:
                one = inspect.BoundArguments(signature, bound.arguments.copy())
                one.arguments[_COUNT] = 1
                encoded = self._recall(original, one)
                if is_one_prompt(encoded):
                    return repeat(encoded, count)
            return _copy(self._recall(original, bound))

        return encode_prompt

    def _recall(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        key = _key(bound.arguments)
        if key not in self._known:
            encoded = original(*bound.args, **bound.kwargs)
            while len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = (bound, encoded)
        return self._known[key][1]


def _key(argument: Any) -> Any:
    """Key of an argument: the value of plain ones, the identity of the rest (tensors, images)."""
    if isinstance(argument, dict):
        return "dict", tuple((name, _key(value)) for name, value in argument.items())
    if isinstance(argument, list | tuple):
        return type(argument), tuple(_key(value) for value in argument)
    if argument is None or isinstance(argument, bool | int | float | str | torch.device | torch.dtype):
        return type(argument), argument
    return "id", id(argument)


def is_one_prompt(encoded: Any) -> bool:
    """Return whether an encoding is recognized as that of one prompt for one image, so that `repeat` is right.

    Recognized are a tensor, a list, and a tuple of these and None, where
      - a tensor (1, ...) of two or more dimensions belongs to the prompt (embeddings, pooled ones, masks);
      - a tensor (L, 3) or (L, 4), L the length of an embedding (1, L, D), L > 1, holds position ids that the whole
        batch shares (FLUX, Chroma); with L = 1 they would look as if they belonged to the prompt;
      - a list of one tensor without a batch dimension, (L, D), is a list over prompts (ERNIE-Image).
    """
    parts = encoded if isinstance(encoded, tuple) else (encoded,)
    lengths = {p.shape[1] for p in parts if isinstance(p, Tensor) and p.ndim == 3 and len(p) == 1}

    def recognized(part: Any) -> bool:
        if isinstance(part, Tensor):
            ids = part.ndim == 2 and part.shape[0] in lengths and part.shape[1] in (3, 4)
            return ids or (part.ndim >= 2 and len(part) == 1)
        if isinstance(part, list):
            return len(part) == 1 and isinstance(part[0], Tensor) and part[0].ndim == 2 and len(part[0]) != 1
        return part is None

    return 1 not in lengths and all(recognized(part) for part in parts)


def repeat(encoded: Any, count: int) -> Any:
    """Repeat the encoding of one prompt for `count` images, in new tensors; see `is_one_prompt`."""
    if isinstance(encoded, tuple):
        return tuple(repeat(part, count) for part in encoded)
    if isinstance(encoded, list):
        return [part.clone() for part in encoded for _ in range(count)]
    if isinstance(encoded, Tensor):
        return encoded.repeat_interleave(count, dim=0) if len(encoded) == 1 else encoded.clone()
    return encoded


def _copy(encoded: Any) -> Any:
    """Copy an encoding, so that changes in place do not reach the kept one."""
    if isinstance(encoded, Tensor):
        return encoded.clone()
    if type(encoded) in (list, tuple):
        return type(encoded)(_copy(part) for part in encoded)
    return encoded

"""Calls of a diffusers pipeline: its arguments, its images, chunks that fit into memory, prompts encoded once."""

from __future__ import annotations

import copy
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


def sample(pipe: Any, prompt: Any, seeds: Sequence[int], /, **arguments: Any) -> tuple[Tensor, list[bool]]:
    """Return a pipeline's images (B, 3, H, W) of B seeds, and whether its safety checker flagged them."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    arguments |= {"output_type": "pt", "generator": generators if len(generators) > 1 else generators[0]}
    with torch.no_grad():  # by name where it can be: the first argument of FLUX.2 is an image
        result = pipe(prompt=prompt, **arguments) if takes(pipe, "prompt") else pipe(prompt, **arguments)
    images = getattr(result, "images", None)
    if not isinstance(images, Tensor):
        raise TypeError(
            "pipe: expected an output whose .images is a tensor, as output_type='pt' asks for, got "
            f"{type(result).__name__} with {type(images).__name__}; pass a diffusers pipeline that makes images"
        )
    pixels.check(images, validate=False, argument="the pipeline's images")
    if len(images) != len(seeds):
        raise ValueError(f"pipe: expected one image per generator, got {len(images)} for {len(seeds)} generators")
    return images, getattr(result, "nsfw_content_detected", None) or [False] * len(seeds)


def check_pipe_kwargs(pipe_kwargs: Mapping[str, Any], owner: str, owned: Mapping[str, str]) -> None:
    """Refuse embeddings of several prompts, and arguments that the `owner` sets; `owned` has them with the remedies."""
    for name, value in pipe_kwargs.items():
        if name in owned:
            raise ValueError(f"{name}: {owner} sets this argument of the pipeline itself; {owned[name]}")
        if name.endswith("prompt_embeds") and isinstance(value, Tensor) and len(value) != 1:
            shape = tuple(value.shape)
            raise ValueError(f"{name}: expected embeddings of one prompt, (1, ...), got {shape}; loop over the prompts")


NO_MEMORY = (
    "not even one candidate fits into memory. Sample smaller images (height=, width=), load the pipeline in half "
    "precision, call pipe.enable_model_cpu_offload() or pipe.vae.enable_tiling(), or move the reward to the CPU "
    "(reward.to('cpu'))"
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


_COUNT = "num_images_per_prompt"
_REMEMBERED = 16  # encodings kept: a pipeline that is given new tensors in every call would fill the memory


class PromptMemo:
    """Keeps what a pipeline's `encode_prompt` returned over several calls of the pipeline.

    While `installed`, an instance attribute replaces the method; components, offloading hooks and compiled modules are
    not touched. The prompt is encoded for one image, and the encoding is then repeated for the call's number of images,
    as pipelines do it themselves; where that is not known to be right, the method runs once per set of arguments. A
    pipeline without `encode_prompt` is not changed.
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
        signature, own = inspect.signature(original), "encode_prompt" in vars(self._pipe)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            count = bound.arguments.get(_COUNT)
            if isinstance(count, int) and count > 1:
                one = inspect.BoundArguments(signature, bound.arguments | {_COUNT: 1})
                if (encoded := repeated(self._recall(original, one), count)) is not None:
                    return encoded
            return copy.deepcopy(self._recall(original, bound))  # so that changes in place do not reach the kept one

        self._pipe.encode_prompt = encode_prompt
        try:
            yield
        finally:
            del self._pipe.encode_prompt
            if own:
                self._pipe.encode_prompt = original

    def _recall(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        key = _key(bound.arguments)
        if key not in self._known:
            self._known[key] = (bound, original(*bound.args, **bound.kwargs))
            if len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        return self._known[key][1]


def _key(argument: Any) -> Any:
    """Return the value of a plain argument, the identity of any other (tensors, images)."""
    if isinstance(argument, dict):
        return "dict", tuple((name, _key(value)) for name, value in argument.items())
    if isinstance(argument, list | tuple):
        return type(argument), tuple(_key(value) for value in argument)
    plain = argument is None or isinstance(argument, bool | int | float | str | torch.device | torch.dtype)
    return (type(argument), argument) if plain else ("id", id(argument))


def repeated(encoded: Any, count: int) -> Any:
    """Repeat the encoding of one prompt for `count` images, in new tensors; None where its layout is not known.

    Known are, alone or in a tuple: None; a tensor (1, ...) of two or more dimensions; position ids (L, 3) or (L, 4)
    that the batch shares (FLUX, Chroma), L > 1 the length of an embedding (1, L, D); a list over prompts of one tensor
    (L, D) (ERNIE-Image).
    """
    parts = encoded if isinstance(encoded, tuple) else (encoded,)
    lengths = {part.shape[1] for part in parts if isinstance(part, Tensor) and part.ndim == 3 and len(part) == 1}
    found: list[Any] = []
    for part in parts:
        match part:
            case None:
                found.append(None)
            case Tensor(ndim=2) if len(part) in lengths and part.shape[1] in (3, 4):
                found.append(part.clone())
            case Tensor() if part.ndim >= 2 and len(part) == 1:
                found.append(part.repeat_interleave(count, dim=0))
            case [Tensor(ndim=2) as only] if len(only) != 1:
                found.append([only.clone() for _ in range(count)])
            case _:
                return None
    if 1 in lengths:  # ids of one token would look like features of the prompt
        return None
    return tuple(found) if isinstance(encoded, tuple) else found[0]

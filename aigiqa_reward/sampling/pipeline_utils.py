"""Calls of a diffusers pipeline: its arguments, its images, chunks that fit into memory, prompts encoded once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.utils.checks import check_prompt

Item = TypeVar("Item")
Result = TypeVar("Result")
_COUNT = "num_images_per_prompt"


def takes(pipe: Callable[..., Any], argument: str) -> bool:
    """Return whether a pipeline's call has an argument of this name."""
    try:
        return argument in inspect.signature(pipe).parameters
    except ValueError:  # a callable without a signature
        return False


def diffusers_class(pipe: object) -> str | None:
    """Return the name of the diffusers class whose `__call__` a pipeline has or inherits; None for any other."""
    for cls in type(pipe).__mro__:
        if "__call__" in vars(cls):
            return cls.__name__ if cls.__module__.startswith("diffusers.") else None
    return None


def _hooks(part: Any) -> list[Any]:
    """Return the registries of diffusers' hooks in a part of a pipeline, one per module that has any."""
    modules = part.modules() if isinstance(part, nn.Module) else ()
    return [module._diffusers_hook for module in modules if hasattr(module, "_diffusers_hook")]


def caches(pipe: Any) -> dict[str, list[Any]]:
    """Return diffusers' hooks that keep results from one call of a part to the next, by the part's name.

    They are there after `enable_cache`, or after functions such as `diffusers.hooks.apply_first_block_cache`.
    """
    found: dict[str, list[Any]] = {}
    for name, part in getattr(pipe, "components", {}).items():
        if keeping := [each for each in _hooks(part) if any(hook._is_stateful for hook in each.hooks.values())]:
            found[name] = keeping
    return found


def moves(pipe: Any, named: Sequence[Any]) -> bool:
    """Return whether a pipeline's parts move between devices while it runs, or layers of those that are `named`."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    layers = any(weight.is_meta for part in parts for weight in part.parameters())  # enable_sequential_cpu_offload
    groups = any(each.get_hook("group_offloading") for part in named for each in _hooks(part))
    return bool(getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None) or layers or groups)


@contextmanager
def global_randomness(seed: int) -> Iterator[Callable[[], bool]]:
    """Seed torch's global random state within this block; gives a function that returns whether it was drawn from."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    sources = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
    with torch.random.fork_rng(devices):
        before = [source.manual_seed(seed).get_state() for source in sources]
        yield lambda: not all(map(torch.equal, before, (source.get_state() for source in sources)))


_TOGETHER = tuple(
    f"{name}Pipeline"
    for name in (
        *("StableDiffusionImg2Img", "StableDiffusionControlNet", "StableDiffusionControlNetImg2Img"),
        *("StableDiffusionXLImg2Img", "StableDiffusionXLControlNet", "StableDiffusionXLControlNetImg2Img"),
        *("StableDiffusionInstructPix2Pix", "StableDiffusionXLInstructPix2Pix", "FluxControlNet", "FluxControl"),
        *("FluxKontext", "Flux2", "Flux2Klein", "QwenImageControlNet"),
    )
)
"""Pipelines that draw nothing for their input images, or from each candidate's own generator."""

_FEATURES = ("prompt", "embeds", "ip_adapter")  # in names of arguments for which nothing is drawn


def _is_image_like(value: Any) -> bool:
    """Return whether an argument of a call is an image, in any form, or has one in it."""
    if isinstance(value, Mapping | list | tuple):
        return any(map(_is_image_like, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, Image.Image) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 1)


class Sampler:
    """Calls a pipeline for the images of seeds, so that each is the image of its seed alone.

    Most pipelines encode an input image with the first candidate's generator, or with torch's global random state, and
    some schedulers draw from that as well; diffusers' caches decide for the whole batch. Those candidates are sampled
    one by one, with the global random state seeded by the candidate's seed. It is restored after every call.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self.pipe, self.arguments = pipe, arguments
        given = [value for name, value in arguments.items() if not any(word in name for word in _FEATURES)]
        self._caches = list(chain(*caches(pipe).values()))
        # Whether one call may sample several candidates:
        self.together = not self._caches and (diffusers_class(pipe) in _TOGETHER or not any(map(_is_image_like, given)))
        # Where nothing converts "pt" to [0, 1] (Kandinsky, DeepFloyd IF), "np" is what the pipeline shows.
        converts = hasattr(getattr(pipe, "image_processor", None), "postprocess") or not hasattr(pipe, "numpy_to_pil")
        self._output_type = "pt" if converts else "np"

    def __call__(self, prompts: str | list[str] | None, seeds: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """Return the images (B, 3, H, W) of B seeds, and whether the pipeline's safety checker flagged them.

        Args:
            prompts: one prompt for all, or a list of B.
            seeds: (B,) of them.
        """
        if self.together or len(seeds) == 1:
            with global_randomness(seeds[0]) as was_drawn_from:
                found = self._call(prompts, seeds)
                if len(seeds) == 1 or not was_drawn_from():
                    return found
            self.together = False
        each = prompts if isinstance(prompts, list) else [prompts] * len(seeds)
        rows = [self(prompt, [seed]) for prompt, seed in zip(each, seeds, strict=True)]
        return torch.cat([images for images, _ in rows]), [flag for _, flags in rows for flag in flags]

    def _call(self, prompts: Any, seeds: Sequence[int]) -> tuple[Tensor, list[bool]]:
        pipe, count = self.pipe, len(seeds)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        own = {"output_type": self._output_type, "generator": generators if count > 1 else generators[0]}
        arguments = {**self.arguments, **own}
        if not isinstance(prompts, list):
            arguments |= {_COUNT: count} if takes(pipe, _COUNT) else {}
        elif count == 1:
            prompts = prompts[0]
        else:  # pipelines differ in whether one negative prompt serves several prompts
            negatives = [name for name in arguments if name.startswith("negative_prompt")]
            arguments |= {name: [arguments[name]] * count for name in negatives if isinstance(arguments[name], str)}
        for hook in self._caches:  # a call that failed leaves its state
            hook.reset_stateful_hooks(recurse=False)
        with torch.no_grad():  # by name where it can be: the first argument of FLUX.2 is an image
            result = pipe(prompt=prompts, **arguments) if takes(pipe, "prompt") else pipe(prompts, **arguments)
        flagged = getattr(result, "nsfw_content_detected", None) or getattr(result, "nsfw_detected", None)
        return self._checked(getattr(result, "images", None), result, count), flagged or [False] * count

    def _checked(self, images: Any, result: Any, count: int) -> Tensor:
        if isinstance(images, np.ndarray) and images.ndim == 4:  # (B, H, W, 3)
            place = getattr(self.pipe, "_execution_device", "cpu")
            images = torch.from_numpy(images).movedim(3, 1).contiguous().to(place)
        if not isinstance(images, Tensor):
            raise TypeError(
                "pipe: expected an output whose .images is a tensor, as output_type='pt' asks for, got "
                f"{type(result).__name__} with {type(images).__name__}; pass a diffusers pipeline that makes images"
            )
        pixels.check(images, validate=False, argument="the pipeline's images")
        if len(images) != count:
            raise ValueError(f"pipe: expected one image per generator, got {len(images)} for {count} generators")
        return images


def check_pipe_kwargs(pipe_kwargs: Mapping[str, Any], owner: str, owned: Mapping[str, str]) -> None:
    """Refuse what is no single prompt that a tokenizer reads, and arguments that the `owner` sets.

    `owned` has them with the remedies.
    """
    for name, value in pipe_kwargs.items():
        if name in owned:
            raise ValueError(f"{name}: {owner} sets this argument of the pipeline itself; {owned[name]}")
        if isinstance(value, str):
            check_prompt(value, name)
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

"""Loading a diffusers pipeline and a LoRA for it: from .safetensors files only. Imports torch when it is needed."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aigiqa_reward.cli.inputs import CommandError
from aigiqa_reward.cli.lora_files import check_lora
from aigiqa_reward.cli.output import say
from aigiqa_reward.cli.sampling_options import PipelineDType

EMBEDDED = "embedded"
"""Instead of a folder or a Hub id: the generator that comes with the package."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_ADAPTER = "lora"
_NO_SUCH_LAYERS = "not found in the base model"  # peft's words where a LoRA names no layer that there is
_NAMED = 3  # of the matrices that fit nothing


def check_model(model: str, option: str = "--model") -> None:
    """Refuse what cannot be a pipeline's name, before anything is loaded.

    Raises:
        CommandError: neither a folder of a pipeline, nor a Hub id, nor 'embedded'.
    """
    place = Path(model).expanduser()
    if model == EMBEDDED:
        return
    if place.is_dir():
        if not (place / "model_index.json").is_file():
            raise CommandError(
                f"{option}: the folder {model} holds no model_index.json; pass one that pipe.save_pretrained wrote"
            )
        return
    siblings = [entry.name for entry in place.parent.iterdir() if entry.is_dir()] if place.parent.is_dir() else []
    meant = difflib.get_close_matches(place.name, [*siblings, EMBEDDED] if len(place.parts) == 1 else siblings, n=1)
    hint = f"; did you mean {place.parent / meant[0]}?" if meant else ""
    if not _HUB_ID.fullmatch(model) or meant:
        raise CommandError(
            f"{option}: expected a folder of a pipeline, a Hub id owner/name or 'embedded', got {model!r}{hint}"
        )


def load_pipeline(
    model: str, device: str, dtype: PipelineDType, *, offload: bool = False, option: str = "--model"
) -> Any:
    """Load a pipeline, with its progress bar off.

    Args:
        model: as `check_model` accepts it.
        device: where to put it.
        dtype: what to compute in.
        offload: keep its parts on the host while they are not used.
        option: which option named it.

    Raises:
        CommandError: there is none, or not with such weights.
    """
    import torch

    if offload and torch.device(device).type == "cpu":
        raise CommandError("--offload: needs a device beside the CPU, such as --device cuda; leave it out")
    computes_in = _dtype(dtype, device)
    pipe: Any
    if model == EMBEDDED:
        from aigiqa_reward import load_embedded_pipeline
        from aigiqa_reward.utils.weights import WeightsError

        try:
            pipe = load_embedded_pipeline(dtype=computes_in)
        except (OSError, WeightsError) as error:
            raise CommandError(str(error), status=1) from error
    else:
        pipe = _load(model, computes_in, option)
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _load(model: str, dtype: Any, option: str) -> Any:
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    place = Path(model).expanduser()
    source = str(place) if place.is_dir() else model
    argument = {"dtype" if version >= (0, 42) else "torch_dtype": dtype}
    try:
        return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **argument)
    except (OSError, ValueError) as error:
        raise CommandError(f"{option}: cannot load the pipeline {model}: {error}") from error


def _dtype(dtype: PipelineDType, device: str) -> Any:
    import torch

    if dtype is not PipelineDType.AUTO:
        return getattr(torch, dtype.value)
    on_cuda = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if on_cuda else torch.float32


# --------------------------------------------------------------------------------------------- LoRA


def add_lora(pipe: Any, lora: str | None, scale: float) -> None:
    """Load a LoRA into a pipeline, if there is one; a warning names what of it fits nothing there.

    Raises:
        CommandError: there is none, not as .safetensors, or not for this pipeline.
    """
    if lora is None:
        return
    from safetensors import SafetensorError

    place = Path(lora).expanduser()
    _check_lora(pipe, lora, place)
    source: dict[str, Any] = {"pretrained_model_name_or_path_or_dict": str(place) if place.exists() else lora}
    if place.is_file():
        source = {"pretrained_model_name_or_path_or_dict": str(place.parent), "weight_name": place.name}
    name = type(pipe).__name__
    read: dict[str, Any] = {}
    try:
        with _silence(), _noted(pipe, read):  # what does not fit is said below
            pipe.load_lora_weights(**source, adapter_name=_ADAPTER, use_safetensors=True)
    except SafetensorError as error:
        raise CommandError(f"--lora: {lora} is not a whole .safetensors file ({error})") from error
    except (RuntimeError, KeyError, AttributeError) as error:  # RecursionError of deep metadata among them
        detail = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), str(error)[:300])
        raise CommandError(f"--lora: {lora} was made for another model than {name}: {detail}") from error
    except (OSError, ValueError, TypeError) as error:
        if _NO_SUCH_LAYERS in str(error):
            raise CommandError(_nothing_fits(lora, name, read)) from error
        raise CommandError(f"--lora: cannot load {lora}: {error}") from error
    there = _parameters(pipe)
    if not there:
        raise CommandError(_nothing_fits(lora, name, read))
    if missing := [layer for layer, parameter in there.items() if parameter.is_meta]:
        raise CommandError(f"--lora: {lora} has one half only of {len(missing)} layers; it lacks {_listed(missing)}")
    if not any(bool(up.any()) for layer, up in there.items() if ".lora_B." in layer):
        raise CommandError(f"--lora: {lora} changes nothing in {name}: its layers have other names, or it is untrained")
    if stray := _strays(there, read):
        of = f"{len(stray)} of {sum(map(_is_matrix, read, read.values()))} matrices"
        say("warning", f"--lora: {of} in {lora} fit nothing in {name} and are left out: {_listed(stray)}")
    pipe.set_adapters([_ADAPTER], adapter_weights=[scale])


def lora_digest(lora: str | None) -> str | None:
    """Tells what is in a LoRA's file or folder from others below the same path; None of one on the Hub."""
    place = Path(lora).expanduser() if lora else None
    if place is None or not place.exists():
        return None
    from aigiqa_reward.utils.run_folder import digest
    from aigiqa_reward.utils.weights import sha256

    return digest([sha256(file) for file in (sorted(place.glob("*.safetensors")) if place.is_dir() else [place])])


def _check_lora(pipe: Any, lora: str, place: Path) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise CommandError(f"--lora: {type(pipe).__name__} takes no LoRA")
    if place.is_file():
        if place.suffix != ".safetensors":
            raise CommandError(f"--lora: expected a .safetensors file, got {lora}; pickled files are never opened")
        return
    if place.is_dir():
        files = sorted(file.name for file in place.glob("*.safetensors"))
        if not files:
            raise CommandError(f"--lora: the folder {lora} holds no .safetensors file")
        if len(files) > 1:
            say("note", f"--lora: {lora} holds {len(files)} .safetensors files; name one of them to be sure")
        return
    if not _HUB_ID.fullmatch(lora):
        raise CommandError(
            f"--lora: expected a .safetensors file, a folder with one or a Hub id owner/name, got {lora!r}"
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Neither diffusers nor transformers say anything, not even errors, which are raised as well."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    from aigiqa_reward.toy.pipeline import quiet_libraries

    with quiet_libraries():
        of_diffusers.set_verbosity(logging.CRITICAL)
        of_transformers.set_verbosity(logging.CRITICAL)
        yield


@contextmanager
def _noted(pipe: Any, read: dict[str, Any]) -> Iterator[None]:
    """Add to `read` what `pipe` reads of a LoRA within, under diffusers' names, whatever names the file has.

    It is checked before anything is done with it.
    """
    original = pipe.lora_state_dict

    def noting(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        parts = found if isinstance(found, tuple) else (found,)
        asked = options.get("return_lora_metadata") and isinstance(found, tuple)
        check_lora(parts[0], parts[-1] if asked else None)
        read.update(parts[0])
        return found

    pipe.lora_state_dict = noting
    try:
        yield
    finally:
        del pipe.lora_state_dict


def _parameters(pipe: Any) -> dict[str, Any]:
    """Of all its layers, by name; without a value where the file had none, and of no effect where lora_B is zero."""
    parts = {place: part for place, part in pipe.components.items() if hasattr(part, "named_parameters")}
    named = ((f"{place}.{name}", item) for place, part in parts.items() for name, item in part.named_parameters())
    return {name: parameter for name, parameter in named if _ADAPTER in name.split(".")}


def _strays(there: Mapping[str, Any], read: Mapping[str, Any]) -> list[str]:
    """Matrices that were read and are in no layer: told by their values, as names change on the way into a layer."""
    digests = {_digest(parameter, parameter.dtype) for parameter in there.values()}
    types = {parameter.dtype for parameter in there.values()}
    return sorted(
        name
        for name, tensor in read.items()
        if _is_matrix(name, tensor) and digests.isdisjoint(_digest(tensor, dtype) for dtype in types)
    )


def _is_matrix(name: str, tensor: Any) -> bool:
    return "lora" in name and tensor.ndim > 1


def _digest(tensor: Any, dtype: Any) -> tuple[Any, ...]:
    import torch

    plain = tensor.detach().to("cpu", dtype).flatten()
    return dtype, tuple(tensor.shape), hashlib.sha256(plain.view(torch.uint8).numpy()).digest()


def _nothing_fits(lora: str, name: str, read: Mapping[str, Any]) -> str:
    layers = f" ({_listed(sorted(read))})" if read else ""
    return f"--lora: nothing in {lora}{layers} fits {name}; it was made for another model"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

"""Rewards, devices, diffusers pipelines and LoRA of the commands. Imports torch when it is needed."""

from __future__ import annotations

import difflib
import gc
import hashlib
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aigiqa_reward.cli._console import CommandError, say
from aigiqa_reward.cli._io import HUB_ID
from aigiqa_reward.cli._options import OneRewardOptions, RewardOptions, SamplingOptions
from aigiqa_reward.toy.world import COLOR_NAMES, NOUNS, read_subject, unknown_words
from aigiqa_reward.utils.io import parse_json

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    from aigiqa_reward import CompositeReward, Reward

EMBEDDED = "embedded"
"""Instead of a folder or a Hub id: the generator in the package."""

EMBEDDED_SAMPLING = {"num_inference_steps": 20, "guidance_scale": 3.0}
"""Sampling that the embedded pipeline was made for."""

EXAMPLE = "a penguin on a green background"
"""A prompt that the embedded pipeline knows."""

_NO_MEMORY = "lower --height and --width, choose a smaller --dtype, or use --offload of best-of-n and pairs"

_NAMED = 3  # matrices that fit nothing
_WORDS = 12  # words that the embedded pipeline does not know


@contextmanager
def library(out_of_memory: str = "lower --batch-size", **options: str) -> Iterator[None]:
    """Around calls of the library: make errors of the command of what it raises about arguments, files and memory.

    `out_of_memory` is the remedy where the library names none; `options` are names of the command's options by argument
    of the library, where they differ.
    """
    import torch

    def text(error: BaseException, message: str) -> str:
        return "; ".join([message, *getattr(error, "__notes__", [])])

    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = spoken(" ".join(getattr(error, "__notes__", [])) or out_of_memory)
        raise CommandError(f"out of memory ({str(error).splitlines()[0]}); {advice}", status=1) from error
    except (ValueError, TypeError, ImportError) as error:
        argument, colon, rest = str(error).partition(": ")
        if colon and argument.isidentifier():
            raise CommandError(text(error, rest), argument=options.get(argument, argument)) from error
        raise CommandError(text(error, str(error))) from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise CommandError(text(error, f"{place}{error.strerror or error}"), status=1) from error


def spoken(reason: str) -> str:
    """Return why sampling failed with the remedies of the command line, where the library names its own."""
    from aigiqa_reward.sampling.pipeline_utils import NO_MEMORY

    return reason.replace(NO_MEMORY, f"not even one candidate fits into memory; {_NO_MEMORY}")


@contextmanager
def loading() -> Iterator[None]:
    """Around imports and weights: do not look for garbage among what is being loaded, a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


# --------------------------------------------------------------------------------------------- rewards


@loading()
def load_rewards(
    options: OneRewardOptions, device: str | None, dtype: str = "float32", *, argument: str = "reward"
) -> dict[str, tuple[Reward, float]]:
    """Build the rewards that the options describe: each with its weight, by a name that no other one has."""
    if not isinstance(options, RewardOptions):
        options = RewardOptions(reward=options.reward, weights=options.weights)
    if options.weights is not None and len(options.reward) > 1:
        raise CommandError("belongs to one reward; for several, put them into the Hub's cache", argument="weights")
    if options.encoder_weights is not None and options.encoder is None:
        raise CommandError("names the weights of --encoder, which is missing", argument="encoder_weights")
    import torch

    place = usable_device(device)
    found = []
    for text in options.reward:
        name, weight = weighted(text, argument)
        if weight <= 0:
            raise CommandError(f"expected a weight above 0, got {text!r}", argument=argument)
        with library(weights=argument if options.weights is None else "weights", name=argument):
            reward = _load_reward(name, options, alone=len(options.reward) == 1)
        found.append((reward.to(device=place, dtype=getattr(torch, dtype)), weight))
    count, seen, named = Counter(reward.name for reward, _ in found), Counter[str](), {}
    for reward, weight in found:
        seen[reward.name] += 1
        number = f"_{seen[reward.name]}" if count[reward.name] > 1 else ""
        named[f"{reward.name}{number}"] = (reward, weight)
    return named


def mixed_reward(options: OneRewardOptions, device: str, argument: str = "reward") -> Reward | CompositeReward:
    """Build one reward: the one that the options name, or the mean of several by weight."""
    named = load_rewards(options, device, argument=argument)
    if len(named) == 1:
        return next(iter(named.values()))[0]
    from aigiqa_reward import CompositeReward

    return CompositeReward(
        {name: reward for name, (reward, _) in named.items()},
        weights={name: weight for name, (_, weight) in named.items()},
    )


def meanings(rewards: Iterable[Any]) -> list[str]:
    """Return how to read the scores of rewards, or of the members of mixtures, in a line each."""
    members = [each for reward in rewards for each in getattr(reward, "members", {"": reward}).values()]
    return list(dict.fromkeys(each.spec.meaning for each in members))


def weighted(text: str, argument: str) -> tuple[str, float]:
    """Split NAME[:NUMBER]; the last colon counts only before a number, so that a Windows path is a name."""
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise CommandError(f"expected a finite number after the colon, got {text!r}", argument=argument)
    return (name, weight) if colon else (text, 1.0)


def _load_reward(name: str, options: RewardOptions, *, alone: bool) -> Reward:
    from aigiqa_reward import Reward, create_reward, list_rewards
    from aigiqa_reward.encoders.open_clip import OpenCLIPConfig

    def chosen(**given: Any) -> dict[str, Any]:
        return {argument: value for argument, value in given.items() if value is not None and value is not False}

    shares = chosen(quality_weight=options.quality_weight, correspondence_weight=options.correspondence_weight)
    saved, reward = chosen(weights=options.weights), None
    if name not in list_rewards() and ("/" in name or os.sep in name or Path(name).expanduser().is_dir()):
        if saved:
            raise CommandError("belongs to a reward's name, got it for a folder; leave it out", argument="weights")
        reward, saved = Reward.from_pretrained(name, **shares), {"weights": name}
    kind = name if reward is None else reward.name
    further: dict[str, Any] = {}
    if alone or (kind == "tsp_mgs" and not saved):
        weights = options.encoder_weights and str(options.encoder_weights)
        tower = options.encoder and OpenCLIPConfig(architecture=options.encoder, pretrained=weights)
        further |= chosen(encoder=tower, zero_shot=options.zero_shot)
    if alone or kind == "cpa_iqa":
        further |= chosen(scenario=options.scenario, preferences=options.preferences)
    return reward if reward and not further else create_reward(kind, **saved, **further, **shares)


def usable_device(name: str | None) -> str:
    """Return the device of that name; None is cuda if there is one, else the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(
            f"cannot compute on {name!r} here ({reason}); try --device cpu", argument="device"
        ) from error
    return name


def process_device(name: str | None) -> str:
    """Return the device of that name; under torchrun each process has its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return usable_device(name)
    if name not in (None, "cpu"):
        raise CommandError(f"each process takes its own device; leave out {name!r}", argument="device")
    from accelerate import PartialState

    return str(PartialState(cpu=name == "cpu").device)


# --------------------------------------------------------------------------------------------- pipelines


def check_model(model: str) -> None:
    """Refuse what cannot be the name of a pipeline, before anything is loaded."""
    place = Path(model).expanduser()
    if model == EMBEDDED or (place / "model_index.json").is_file():
        return
    if place.is_dir():
        text = f"the folder {model} holds no model_index.json; pass one that pipe.save_pretrained wrote"
        raise CommandError(text, argument="model")
    if place.suffix in (".safetensors", ".ckpt"):
        text = f"expected the folder of a diffusers pipeline, got the single file {model}; convert it once in Python: "
        text += f"StableDiffusionXLPipeline.from_single_file({model!r}).save_pretrained('FOLDER') (or its other class)"
        raise CommandError(text, argument="model")
    siblings = [entry.name for entry in place.parent.iterdir() if entry.is_dir()] if place.parent.is_dir() else []
    meant = difflib.get_close_matches(place.name, [*siblings, EMBEDDED], n=1)
    if not HUB_ID.fullmatch(model) or meant:
        hint = f"; did you mean {place.parent / meant[0]}?" if meant else ""
        text = f"expected a folder of a pipeline, a Hub id owner/name or 'embedded', got {model!r}{hint}"
        raise CommandError(text, argument="model")


@loading()
def load_pipeline(
    model: str, device: str, dtype: str, *, offload: bool = False, quantize: str | None = None, fsdp: bool = False
) -> DiffusionPipeline:
    """Load a pipeline whose name `check_model` accepts, with its progress bar off.

    Linear layers are in 4 bits with `quantize="nf4"`; with `fsdp` the denoiser is sharded over the processes.
    """
    import torch

    if offload and torch.device(device).type == "cpu":
        raise CommandError("needs a device beside the CPU, such as --device cuda; leave it out", argument="offload")
    if dtype == "auto":
        narrow = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if narrow else "float32"
    computes_in = getattr(torch, dtype)
    if quantize == "nf4":
        pipe: Any = _load_nf4(model, computes_in)
    else:
        pipe = _load_embedded(computes_in) if model == EMBEDDED else _load(model, computes_in)
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    if fsdp:
        from aigiqa_reward.finetuning.sharding import shard_denoiser

        with library():
            shard_denoiser(pipe)
    return pipe.to(device)


def _load_embedded(dtype: torch.dtype) -> Any:
    from aigiqa_reward import load_embedded_pipeline
    from aigiqa_reward.utils.weights import WeightsError

    try:
        return load_embedded_pipeline(dtype=dtype)
    except (OSError, WeightsError) as error:
        raise CommandError(str(error), status=1) from error


def report_unknown(prompts: Sequence[str]) -> None:
    """Print which words of prompts the embedded pipeline does not know, and what it knows."""
    colors, subjects = ", ".join(COLOR_NAMES), list(map(read_subject, prompts))
    lost = [prompt for prompt, subject in zip(prompts, subjects, strict=True) if subject.noun is None]
    if lost:
        them = "this prompt names" if len(prompts) == 1 else f"{len(lost)} of {len(prompts)} prompts name"
        say("warning", f"the embedded generator knows nothing that {them}; try {EXAMPLE!r}")
        say("note", f"it knows {len(NOUNS)} things: {', '.join(NOUNS)}")
        say("note", f"on {len(COLOR_NAMES)} background colors: {colors}")
    if words := unknown_words(" ".join(prompt for prompt in prompts if prompt not in lost)):
        knows = f"it knows {len(NOUNS)} things and these background colors: {colors}"
        say("warning", f"the embedded generator does not know {', '.join(words[:_WORDS])}; {knows}")
    elif not lost and any(subject.color is None for subject in subjects):
        say("warning", f"the prompt names no background color that the embedded generator knows ({colors})")


def _load_nf4(model: str, dtype: torch.dtype) -> Any:
    from aigiqa_reward.toy.pipeline import GENERATOR, quiet_libraries

    embedded = model == EMBEDDED
    with _bitsandbytes_without_gpu(), quiet_libraries() if embedded else nullcontext():
        return _load(str(GENERATOR) if embedded else model, dtype, _nf4)


def _nf4(source: str, dtype: torch.dtype) -> Any:
    """Return that the linear layers of the denoiser, and of text encoders other than CLIP's small ones, are in nf4."""
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig  # pyright: ignore[reportPrivateImportUsage]

    kinds: Any = DiffusionPipeline.load_config(source)
    large = [name for name, kind in kinds.items() if "CLIP" not in str(kind)]
    names = [name for name in large if name.startswith(("transformer", "unet", "text_encoder"))]
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return PipelineQuantizationConfig("bitsandbytes_4bit", settings, names)


@contextmanager
def _bitsandbytes_without_gpu() -> Iterator[None]:
    """Let diffusers quantize on the CPU where there is no GPU; it refuses, but bitsandbytes can."""
    import torch
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    if torch.accelerator.is_available():
        yield
        return

    class OnCPU(BnB4BitDiffusersQuantizer):
        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            pass

        def update_device_map(self, device_map: Any) -> Any:
            return {"": "cpu"}

    before = dict(AUTO_QUANTIZER_MAPPING)
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = OnCPU
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(before)


def _load(model: str, dtype: torch.dtype, quantization: Callable[[str, torch.dtype], Any] | None = None) -> Any:
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    place = Path(model).expanduser()
    arguments: dict[str, Any] = {"dtype" if version >= (0, 42) else "torch_dtype": dtype}
    try:
        source = str(place) if place.is_dir() else model
        if quantization is not None:
            arguments["quantization_config"] = quantization(source, dtype)
        return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"cannot load the pipeline {model}: {error}", argument="model") from error


def sampling_arguments(
    options: SamplingOptions, model: str, taken: Collection[str] = (), **more: Any
) -> dict[str, Any]:
    """Return the arguments of the pipeline's call: those with an option (`more`, None is not given) and of --set.

    `taken` are names that --set may not have, as they are arguments of what calls the pipeline.
    """
    names = ("num_inference_steps", "guidance_scale", "height", "width")
    named = {name: getattr(options, name) for name in names} | more
    named = {name: value for name, value in named.items() if value is not None}
    further = parse_settings(options.settings)
    if twice := sorted(named.keys() & further.keys()):
        spelled = twice[0].replace("_", "-")
        raise CommandError(f"{twice[0]} is given by --{spelled} already", argument="settings")
    if wrong := sorted(further.keys() & {"prompt", *taken}):
        text = f"{wrong[0]} is not a further argument of the pipeline; see the options of this command"
        raise CommandError(text, argument="settings")
    return {**(EMBEDDED_SAMPLING if model == EMBEDDED else {}), **named, **further}


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE texts of --set, each value as JSON or, if it is not JSON, as a text."""
    settings: dict[str, Any] = {}
    for item in given:
        key, value = assigned(item, "settings", "KEY=VALUE")
        if key in settings:
            raise CommandError(f"got {key} twice", argument="settings")
        try:
            settings[key] = parse_json(value)
        except ValueError:
            settings[key] = value
    return settings


def assigned(item: str, argument: str, form: str) -> tuple[str, str]:
    """Split KEY=VALUE."""
    key, equals, value = item.partition("=")
    if not equals or not key.strip() or not value:
        raise CommandError(f"expected {form}, got {item!r}", argument=argument)
    return key.strip(), value


# --------------------------------------------------------------------------------------------- LoRA


def add_loras(pipe: Any, loras: Sequence[str]) -> None:
    """Load LoRAs, PATH[:SCALE] each, into a pipeline; a warning names what fits nothing there."""
    scales = []
    for number, text in enumerate(loras):
        lora, scale = weighted(text, "lora")
        _add_lora(pipe, lora, f"lora{number}")
        scales.append(scale)
    if loras:
        pipe.set_adapters([f"lora{number}" for number in range(len(loras))], adapter_weights=scales)


def lora_identity(loras: Sequence[str]) -> list[list[Any]]:
    """Return path, scale and a digest of the weights of each LoRA; no digest of one on the Hub."""
    from aigiqa_reward.utils.weights import sha256

    found = []
    for text in loras:
        lora, scale = weighted(text, "lora")
        place = Path(lora).expanduser()
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.exists() else []
        found.append([lora, scale, [sha256(file)[:16] for file in files]])
    return found


def _add_lora(pipe: Any, lora: str, adapter: str) -> None:
    from safetensors import SafetensorError

    source, name = _lora_source(pipe, lora), type(pipe).__name__
    try:
        with _silence():  # what does not fit is reported below
            read = pipe.lora_state_dict(**source, use_safetensors=True)
            pipe.load_lora_weights(**source, adapter_name=adapter, use_safetensors=True)
    except SafetensorError as error:
        raise CommandError(f"{lora} is not a whole .safetensors file ({error})", argument="lora") from error
    except (RuntimeError, KeyError, AttributeError, OSError, ValueError, TypeError) as error:
        lines = str(error).splitlines()
        detail = next((line.strip() for line in lines if "mismatch" in line), " ".join(lines)[:300])
        text = f"cannot load {lora} into {name}; was it made for another model? {detail}"
        raise CommandError(text, argument="lora") from error
    parts = {place: part for place, part in pipe.components.items() if hasattr(part, "named_parameters")}
    named = ((f"{place}.{key}", item) for place, part in parts.items() for key, item in part.named_parameters())
    there = {key: parameter for key, parameter in named if adapter in key.split(".")}
    if missing := [layer for layer, parameter in there.items() if parameter.is_meta]:
        text = f"{lora} holds only one half of {len(missing)} layers; it lacks {_listed(missing)}"
        raise CommandError(text, argument="lora")
    if not any(bool(up.any()) for layer, up in there.items() if ".lora_B." in layer):
        text = f"{lora} changes nothing in {name}: it was made for another model, or is untrained"
        raise CommandError(text, argument="lora")
    tensors = read[0] if isinstance(read, tuple) else read
    matrices = {key: tensor for key, tensor in tensors.items() if "lora" in key and tensor.ndim > 1}
    if stray := _strays(there, matrices):
        count = f"{len(stray)} of {len(matrices)} matrices in {lora}"
        say("warning", f"--lora: {count} fit nothing in {name} and are left out: {_listed(stray)}")


def _lora_source(pipe: Any, lora: str) -> dict[str, str]:
    """Arguments of `pipe.load_lora_weights` for a file, a folder or a Hub id."""
    place = Path(lora).expanduser()
    if not hasattr(pipe, "load_lora_weights"):
        raise CommandError(f"{type(pipe).__name__} takes no LoRA", argument="lora")
    if place.is_file() and place.suffix == ".safetensors":
        return {"pretrained_model_name_or_path_or_dict": str(place.parent), "weight_name": place.name}
    if place.is_file() or not (HUB_ID.fullmatch(lora) or any(place.glob("*.safetensors"))):
        text = f"expected a .safetensors file, a folder with one or a Hub id owner/name, got {lora!r}"
        raise CommandError(text, argument="lora")
    return {"pretrained_model_name_or_path_or_dict": str(place) if place.exists() else lora}


@contextmanager
def _silence() -> Iterator[None]:
    """Silence diffusers and transformers, errors included, which are raised as well."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    from aigiqa_reward.toy.pipeline import quiet_libraries

    with quiet_libraries():
        of_diffusers.set_verbosity(logging.CRITICAL)
        of_transformers.set_verbosity(logging.CRITICAL)
        yield


def _strays(there: Mapping[str, Any], matrices: Mapping[str, Any]) -> list[str]:
    """Matrices of a file that are in no layer, found by their values, as names change on the way into a layer."""
    import torch

    def digest(tensor: Any, dtype: Any) -> tuple[Any, ...]:
        plain = tensor.detach().to("cpu", dtype).flatten()
        return dtype, tuple(tensor.shape), hashlib.sha256(plain.view(torch.uint8).numpy()).digest()

    known = {digest(parameter, parameter.dtype) for parameter in there.values()}
    types = {parameter.dtype for parameter in there.values()}
    return sorted(
        name for name, tensor in matrices.items() if known.isdisjoint(digest(tensor, dtype) for dtype in types)
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

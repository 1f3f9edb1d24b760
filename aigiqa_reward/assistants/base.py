"""The contract of each assistant, and what the pretrained ones share: identity, loading at first use, batches, cache.

Weights are read from safetensors only, and a repository's code is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from aigiqa_reward.assistants.cache import AssistantCache, Content, Value
from aigiqa_reward.utils.checks import integer
from aigiqa_reward.utils.isolation import building, isolated


class Captioner(Protocol):
    """Describes images in words."""

    def describe(self, images: Tensor, /) -> list[str]:
        """Return one text per image of (B, 3, H, W) in [0, 1]."""
        ...


class SemanticsReader(Protocol):
    """Reads meaning and coherence of images as features of a language model."""

    @property
    def width(self) -> int:
        """Width of the features."""
        ...

    def read(self, images: Tensor, /) -> Tensor:
        """Return (B, 2, width) float32 features of images (B, 3, H, W) in [0, 1]."""
        ...


class Segmenter(Protocol):
    """Finds the regions of images."""

    def segment(self, images: Tensor, /) -> Tensor:
        """Return (B, R, 64, 64) soft masks in [0, 1] of images (B, 3, H, W) in [0, 1]; unused places are zero."""
        ...


class AttributeReader(Protocol):
    """Splits prompts into visual attributes."""

    def decompose(self, texts: list[str], /) -> list[list[str]]:
        """Return at least one short phrase per text, in its order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Assistants:
    """The assistants of a model; where one is None the model uses its offline substitute and says so in `details`.

    Attributes:
        captioner: describes images (SC-AGIQA).
        semantics: reads the meaning of images as features (MA-AGIQA).
        segmenter: finds regions (CPA-IQA).
        attributes: splits prompts into attributes (CPA-IQA).
    """

    captioner: Captioner | None = None
    semantics: SemanticsReader | None = None
    segmenter: Segmenter | None = None
    attributes: AttributeReader | None = None

    def __post_init__(self) -> None:
        methods = {"captioner": "describe", "semantics": "read", "segmenter": "segment", "attributes": "decompose"}
        for role, method in methods.items():
            given = getattr(self, role)
            if isinstance(given, type) or (given is not None and not callable(getattr(given, method, None))):
                got = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
                raise TypeError(f"{role}: expected an assistant with a method {method}(), or None, got {got}")


@dataclass(frozen=True, kw_only=True)
class AssistantConfig:
    """Which pretrained model, and where it runs.

    Attributes:
        path_or_id: folder written by save_pretrained, or name of a model on the Hub.
        revision: commit, tag or branch on the Hub. Pin it: the cache does not notice when a branch moves.
        device: device of the model; images may be on another.
        dtype: dtype of the weights.
        batch_size: rows per forward pass.
    """

    path_or_id: str
    revision: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 8

    def __post_init__(self) -> None:
        name = self.path_or_id if isinstance(self.path_or_id, str) else ""
        if not name.strip() or Path(name).suffix in (".pt", ".pth", ".bin", ".ckpt"):
            raise ValueError(
                f"path_or_id: expected a folder or a model's name on the Hub, got {self.path_or_id!r}; pickled "
                "checkpoints are never opened: convert one with save_pretrained, which makes model.safetensors"
            )
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating torch.dtype such as torch.bfloat16, got {self.dtype!r}")
        for field in fields(self):
            if type(field.default) is int:
                integer(field.name, getattr(self, field.name), least=1)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None if `path_or_id` names a model on the Hub."""
        folder = Path(self.path_or_id).expanduser()
        return folder if folder.is_dir() else None


Config = TypeVar("Config", bound=AssistantConfig)


class PretrainedAssistant(Generic[Config]):
    """A pretrained model of transformers that gives text, masks or features, without gradients; loaded at first use.

    Args:
        config: which model, and its settings.
        cache: folder of answers; None asks the model every time.

    Attributes:
        kind: name in identities and progress bars.
        recipe: what else determines an answer: fixed questions, instructions, sizes.
        wanted: kind of model, for errors.
        mapping: transformers' mapping of the configurations that fit.
        parts: transformers' classes of the processor or tokenizer, and of the network.
    """

    kind: ClassVar[str]
    recipe: ClassVar[Mapping[str, Any]] = {}
    wanted: ClassVar[str]
    mapping: ClassVar[str]
    parts: ClassVar[tuple[str, str]]

    def __init__(self, config: Config, *, cache: AssistantCache | None = None) -> None:
        self.config = config
        self.cache = cache

    @cached_property
    def identity(self) -> str:
        """JSON of all that determines an answer besides the content: kind, model, revision, dtype, settings, recipe.

        For a local folder also the names, sizes and times of its files, so that other weights are another model.
        """
        settings = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        del settings["device"], settings["batch_size"]  # no answer depends on them
        settings["dtype"] = str(self.config.dtype).removeprefix("torch.")
        if (folder := self.config.folder) is not None:
            files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".md"]
            settings["path_or_id"] = str(folder.resolve())
            settings["files"] = [(f.name, (status := f.stat()).st_size, status.st_mtime_ns) for f in files]
        return json.dumps({"kind": self.kind, **settings, **self.recipe}, sort_keys=True)

    @cached_property
    def _description(self) -> Any:
        description = self._load("AutoConfig")
        if not self._fits(description):
            raise ValueError(
                f"path_or_id: {self.config.path_or_id!r} is a {description.model_type!r} model, not {self.wanted}; "
                "pass one that the Hub lists as such"
            )
        return description

    def _fits(self, description: Any) -> bool:
        import transformers

        return type(description) in getattr(transformers, self.mapping)

    @cached_property
    def _processor(self) -> Any:
        _ = self._description  # refuses a model of another kind, which may have no processor
        return self._load(self.parts[0])

    @cached_property
    def _model(self) -> Any:
        _ = self._processor  # before the weights, which take long to read
        try:
            torch.empty(0, device=self.config.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {self.config.device!r} is not available here; pass device='cpu'") from error
        options = {"dtype": self.config.dtype, "use_safetensors": True, "output_loading_info": True}
        model, report = self._load(self.parts[1], **options)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"path_or_id: {self.config.path_or_id!r} lacks {len(missing)} weights of {type(model).__name__} "
                f"(first: {missing[0]}), which would be random; pass a checkpoint that was saved as {self.wanted}"
            )
        return model.requires_grad_(False).eval().to(self.config.device)

    def _load(self, part: str, **options: Any) -> Any:
        """Load one part of the model (configuration, processor, tokenizer, network) by a class of transformers."""
        import transformers
        from safetensors import SafetensorError

        config = self.config
        try:
            with building():
                return getattr(transformers, part).from_pretrained(
                    str(config.folder or config.path_or_id),
                    revision=config.revision,
                    trust_remote_code=False,
                    **options,
                )
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ValueError(
                f"path_or_id: {config.path_or_id!r} could not be loaded as {self.wanted}: "
                f"{lines[0].rstrip('.:') if lines else type(error).__name__}; pass a folder with config.json and "
                "model.safetensors, as save_pretrained writes them (pickles are never opened), or a model's name on "
                "the Hub, and check the revision and the network"
            ) from error

    def _serve(
        self, contents: Sequence[Content], answer: Callable[[list[int]], Sequence[Value]], form: type[Value]
    ) -> list[Value]:
        """Return the answer to each row, from the cache or from `answer`, which gets at most `batch_size` rows."""
        from tqdm.auto import tqdm

        def compute(rows: list[int]) -> Iterator[Value]:
            size = self.config.batch_size
            with tqdm(total=len(rows), desc=self.kind, leave=False, disable=len(rows) <= 4) as bar:
                for chunk in (rows[start : start + size] for start in range(0, len(rows), size)):
                    with torch.no_grad(), isolated():
                        values = answer(chunk)
                    yield from values
                    bar.update(len(chunk))

        identity = self.identity  # before the weights are loaded
        if self.cache is None:
            return list(compute(list(range(len(contents)))))
        return self.cache.get_or_compute(identity, contents, compute, form=form)


def pad_on_the_left(tokenizer: Any) -> None:
    """Pad on the left, so that generated text follows the question; without a padding token use the end token."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def generate_greedily(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    """Generate greedily, one text per row, without the prompt; the model's settings hold except those of sampling."""
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    tokens = model.generate(**inputs, **greedy, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    prompt = inputs["input_ids"]
    if torch.equal(tokens[:, : prompt.shape[1]], prompt):  # an encoder-decoder gives the answer alone
        tokens = tokens[:, prompt.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

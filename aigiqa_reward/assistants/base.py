"""The contract of each assistant, and what the pretrained ones share: identity, loading at first use, batches, cache.

Weights are read from safetensors only, and a repository's code is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from aigiqa_reward.assistants.cache import AssistantCache, Content, Value
from aigiqa_reward.utils.checks import integer


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


_METHODS = {"captioner": "describe", "semantics": "read", "segmenter": "segment", "attributes": "decompose"}


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
        for role, method in _METHODS.items():
            assistant = getattr(self, role)
            is_class = isinstance(assistant, type)
            if is_class or (assistant is not None and not callable(getattr(assistant, method, None))):
                given = f"the class {assistant.__name__}" if is_class else type(assistant).__name__
                raise TypeError(
                    f"{role}: expected an assistant with a method {method}(), or None, got {given}; "
                    "aigiqa_reward.assistants has one for every role"
                )


_PICKLES = (".pt", ".pth", ".bin", ".ckpt")

_NOT_IN_ANSWER = ("device", "batch_size")
"""Fields of a configuration on which no answer depends."""

_FEW = 4
"""Up to this many answers are computed without a progress bar."""


@dataclass(frozen=True, kw_only=True)
class AssistantConfig:
    """Which pretrained model, and where it runs.

    Attributes:
        path_or_id: folder written by save_pretrained, or name of a model on the Hub.
        revision: commit, tag or branch on the Hub; None for the default branch. Pin it: the cache knows answers by this
            revision, and does not notice when a branch moves.
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
        if not isinstance(self.path_or_id, str) or not self.path_or_id.strip():
            raise ValueError(f"path_or_id: expected a folder or a model's name on the Hub, got {self.path_or_id!r}")
        if Path(self.path_or_id).suffix in _PICKLES:
            raise ValueError(
                f"path_or_id: expected a folder or a model's name on the Hub, got {self.path_or_id!r}; pickled "
                "checkpoints are never opened: convert it with save_pretrained, which makes model.safetensors"
            )
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(
                f"device: expected a torch device such as 'cpu' or 'cuda:0', got {self.device!r}"
            ) from error
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating torch.dtype such as torch.bfloat16, got {self.dtype!r}")
        integer("batch_size", self.batch_size, least=1)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None if `path_or_id` names a model on the Hub."""
        folder = Path(self.path_or_id).expanduser()
        return folder if folder.is_dir() else None


Config = TypeVar("Config", bound=AssistantConfig)


class PretrainedAssistant(Generic[Config]):
    """A pretrained model that gives text, masks or features, without gradients.

    Args:
        config: which model, and its settings.
        cache: folder of answers; None asks the model every time.
    """

    kind: ClassVar[str]
    """Name in identities and progress bars."""

    def __init__(self, config: Config, *, cache: AssistantCache | None = None) -> None:
        self.config = config
        self.cache = cache

    @cached_property
    def identity(self) -> str:
        """JSON of everything that determines an answer besides the content.

        It holds the kind, the model, the revision, the dtype and the settings, and for a local folder the names, sizes
        and times of its files, so that weights trained further count as another model.
        """
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config) if f.name not in _NOT_IN_ANSWER}
        settings["dtype"] = str(self.config.dtype).removeprefix("torch.")
        if self.config.folder is not None:
            settings["path_or_id"] = str(self.config.folder.resolve())
            settings["files"] = _files_of(self.config.folder)
        return json.dumps({"kind": self.kind, **settings, **self._recipe()}, sort_keys=True)

    def _recipe(self) -> dict[str, Any]:
        """Return what else determines an answer: fixed questions, instructions, sizes."""
        return {}

    def _serve(
        self, contents: Sequence[Content], answer: Callable[[list[int]], Sequence[Value]], form: type[Value]
    ) -> list[Value]:
        """Return the answer to each row, from the cache or from `answer`, which gets at most `batch_size` rows."""
        from tqdm.auto import tqdm

        def compute(rows: list[int]) -> Iterator[Value]:
            size = self.config.batch_size
            with tqdm(total=len(rows), desc=self.kind, leave=False, disable=len(rows) <= _FEW) as bar:
                for chunk in (rows[start : start + size] for start in range(0, len(rows), size)):
                    with torch.no_grad():
                        values = answer(chunk)
                    yield from values
                    bar.update(len(chunk))

        identity = self.identity  # before the weights are loaded
        if self.cache is None:
            return list(compute(list(range(len(contents)))))
        return self.cache.get_or_compute(identity, contents, compute, form=form)


def _files_of(folder: Path) -> list[tuple[str, int, int]]:
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".md"]
    return [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]


def load_part(part: str, config: AssistantConfig, *, wanted: str, **options: Any) -> Any:
    """Load one part of a model (its configuration, processor, tokenizer or network) by a class of transformers.

    Args:
        part: name of the class, such as "AutoProcessor".
        config: which model.
        wanted: kind of model, for errors: "an image-text-to-text model".
        **options: passed to from_pretrained.

    Raises:
        ValueError: the model cannot be found, read or used; with the reason and a remedy.
    """
    import transformers
    from safetensors import SafetensorError

    place = str(config.folder or config.path_or_id)
    try:
        return getattr(transformers, part).from_pretrained(
            place, revision=config.revision, trust_remote_code=False, **options
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"path_or_id: {config.path_or_id!r} could not be loaded as {wanted}: "
            f"{lines[0].rstrip('.:') if lines else type(error).__name__}; pass a folder with config.json and "
            "model.safetensors, as save_pretrained writes them (pickles are never opened), or a model's name on "
            "the Hub, and check the revision and the network"
        ) from error


def load_description(config: AssistantConfig, *, mapping: str, wanted: str) -> Any:
    """Load a model's configuration, and refuse one that is not in a mapping of transformers; reads no weights."""
    import transformers

    description = load_part("AutoConfig", config, wanted=wanted)
    if type(description) not in getattr(transformers, mapping):
        raise ValueError(
            f"path_or_id: {config.path_or_id!r} is a {description.model_type!r} model, not {wanted}; pass one that "
            "the Hub lists as such"
        )
    return description


def load_model(part: str, config: AssistantConfig, *, wanted: str) -> Any:
    """Load a network with all its weights, frozen, in evaluation mode and on its device."""
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {config.device!r} is not available here; pass device='cpu'") from error
    model, report = load_part(
        part, config, wanted=wanted, dtype=config.dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"path_or_id: the checkpoint of {config.path_or_id!r} lacks {len(missing)} weights of "
            f"{type(model).__name__} (first: {missing[0]}), which would be random; pass one that was saved as {wanted}"
        )
    return model.requires_grad_(False).eval().to(config.device)

"""BLIP as an encoder of texts that attend to an image: each word's state after cross-attention to the patches.

Li et al., "BLIP: Bootstrapping language-image pre-training for unified vision-language understanding and generation",
2022, as transformers builds it. ImageReward (Xu et al. 2023) is this model, a ViT-L/16 at 224 px, fine-tuned on human
preferences; SC-AGIQA compares prompt and description by these states.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders._text import read_tokens
from aigiqa_reward.encoders.clip import CLIP_MEAN, CLIP_STD
from aigiqa_reward.types import Images
from aigiqa_reward.utils.io import MAX_BYTES, read_regular

_CONFIG_FILE, _TOKENIZER_FILE = "config.json", "tokenizer.json"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}
_UNUSED = ("itm_head.", "vision_proj.", "text_proj.")  # heads that do not affect the words' states
_REMEDY = (
    "expected a folder or Hub id of a transformers BlipForImageTextRetrieval with config.json, model.safetensors and "
    "tokenizer.json"
)


@dataclass(frozen=True, kw_only=True)
class BLIPConfig:
    """Choice of a BLIP model.

    Attributes:
        path_or_id: folder written by `BlipForImageTextRetrieval.save_pretrained` and its tokenizer's, or the Hub id
            owner/name of one. ImageReward's own checkpoint must be converted to it once: a ViT-L/16 at 224 px whose
            `vision_config.layer_norm_eps` is 1e-6 (the default is 1e-5), and a text encoder of 12 heads.
        revision: branch, tag or commit of a Hub id; None for a folder.
        window: most tokens of a text, start and end included; 35 in ImageReward and the code of SC-AGIQA.
    """

    path_or_id: str
    revision: str | None = None
    window: int = 128

    def __post_init__(self) -> None:
        if Path(self.path_or_id).suffix in _PICKLES:
            raise ValueError(f"path_or_id: pickled checkpoints are never opened, got {self.path_or_id!r}; {_REMEDY}")
        if self.revision is not None and Path(self.path_or_id).is_dir():
            raise ValueError(f"revision: expected None for the local folder {self.path_or_id!r}, got {self.revision!r}")
        if self.window < 3:
            raise ValueError(f"window: expected at least 3 tokens (start, one word, end), got {self.window}")


class BLIPEncoder(nn.Module):
    """BLIP's image tower and image-grounded text encoder; differentiable in the pixels.

    `ground(look(images), **read(texts))` gives the state of every word of text i, conditioned on image i. With
    `load_weights=False` the weights are random, to be filled from a saved reward.
    """

    mean, std = CLIP_MEAN, CLIP_STD

    def __init__(self, config: BLIPConfig, *, load_weights: bool = True) -> None:
        super().__init__()
        self.config = config
        architecture = _architecture(config)
        self.tokenizer = _tokenizer(config)
        text, vision = architecture.text_config, architecture.vision_config
        _check_fit(config, text, self.tokenizer)
        model = _model(config, architecture, load_weights)
        self.vision: Any = model.vision_model
        self.text: Any = model.text_encoder
        self.image_size = int(vision.image_size)
        self.width = self.grounded_width = int(text.hidden_size)
        self.vision_width = int(vision.hidden_size)
        origin = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
        described = json.loads(architecture.to_json_string())
        self._description = {name: value for name, value in described.items() if name not in origin}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> BLIPEncoder:
        """Build a model, tokenizer included, from the output of `describe`, with random weights."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / _CONFIG_FILE).write_text(json.dumps(description["blip"]), encoding="utf-8")
            (Path(folder) / _TOKENIZER_FILE).write_text(description["tokenizer"], encoding="utf-8")
            return cls(BLIPConfig(path_or_id=folder, window=description["window"]), load_weights=False)

    def describe(self) -> dict[str, Any]:
        return {"blip": self._description, "tokenizer": self.tokenizer.to_str(), "window": self.config.window}

    def look(self, images: Images) -> Float[Tensor, "batch patches vision_width"]:
        """Encode images in [0, 1] of `image_size` px: class token and patches after the final norm."""
        if images.shape[2:] != (self.image_size, self.image_size):  # transformers would use the wrong positions
            raise ValueError(f"images: expected sides of {self.image_size} px, got {tuple(images.shape[2:])}; resize")
        inputs = pixels.normalize(images, self.mean, self.std).to(self.vision.embeddings.class_embedding.dtype)
        seen = self.vision(pixel_values=inputs).last_hidden_state
        return seen.to(torch.promote_types(images.dtype, torch.float32))

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts to "text" (P, L) ids and "mask" (P, L), False at padding; warns of words that are not read.

        BLIP's training put [ENC] in the place of [CLS] before cross-attention; its published matching model,
        transformers, ImageReward (in training as well) and SC-AGIQA keep [CLS], as here.
        """
        if isinstance(texts, str) or not texts:
            raise TypeError(f"texts: expected a list of at least one text, got {texts!r}")
        padding = int(self.text.config.pad_token_id or 0)
        ids, mask = read_tokens(
            self.tokenizer, texts, self.config.window, tower="BLIP", argument="texts", padding=padding
        )
        device = self.vision.embeddings.class_embedding.device
        return {"text": ids.to(device), "mask": mask.to(device)}

    def ground(self, seen: Tensor, text: Tensor, mask: Tensor) -> Float[Tensor, "batch length width"]:
        """Compute the state of each token of text i, conditioned on image i by cross-attention in every layer."""
        weight = self.text.embeddings.word_embeddings.weight
        states = self.text(
            input_ids=text, attention_mask=mask.long(), encoder_hidden_states=seen.to(weight.dtype)
        ).last_hidden_state
        return states.to(torch.promote_types(seen.dtype, torch.float32))


def blip_towers(vision: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build transformers' image tower and image-grounded text encoder from fields of their configurations."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    return BlipVisionModel(BlipVisionConfig(**vision)), BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)


def _architecture(config: BLIPConfig) -> Any:
    from transformers import AutoConfig, BlipConfig

    source = config.path_or_id
    if not Path(source).is_dir() and (Path(source).is_absolute() or source.count("/") != 1):
        raise ValueError(f"path_or_id: no folder {source!r}, and no Hub id owner/name either; {_REMEDY}")
    try:
        found = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _failed(config, error) from error
    if not isinstance(found, BlipConfig):
        raise ValueError(f"path_or_id: {source!r} holds a {found.model_type!r} model, expected 'blip'; {_REMEDY}")
    return found


def _tokenizer(config: BLIPConfig) -> Tokenizer:
    from huggingface_hub import hf_hub_download

    folder, name = Path(config.path_or_id), _TOKENIZER_FILE
    try:
        file = folder / name if folder.is_dir() else hf_hub_download(config.path_or_id, name, revision=config.revision)
        tokenizer = Tokenizer.from_str(read_regular(file, most=MAX_BYTES).decode("utf-8"))
        tokenizer.encode("\N{SNOWMAN}")  # fails where its token for unknown words is none of its vocabulary
    except Exception as error:  # tokenizers raises bare Exception
        raise _failed(config, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_fit(config: BLIPConfig, text: Any, tokenizer: Tokenizer) -> None:
    if not text.is_decoder:
        raise ValueError(f"path_or_id: the text tower of {config.path_or_id!r} has no cross-attention; {_REMEDY}")
    if (size := tokenizer.get_vocab_size()) > text.vocab_size:
        raise ValueError(f"path_or_id: expected {_TOKENIZER_FILE} with at most {text.vocab_size} tokens, got {size}")
    if config.window > text.max_position_embeddings:
        raise ValueError(f"window: expected at most the model's {text.max_position_embeddings}, got {config.window}")


def _model(config: BLIPConfig, architecture: Any, load_weights: bool) -> Any:
    from transformers import BlipForImageTextRetrieval

    if not load_weights:
        return BlipForImageTextRetrieval(architecture)
    load: Any = BlipForImageTextRetrieval.from_pretrained
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = load(config.path_or_id, config=architecture, revision=config.revision, **options)
    except Exception as error:  # from OSError to safetensors' own, by what is wrong with the files
        raise _failed(config, error) from error
    problems = [name for name in report["missing_keys"] if not name.startswith(_UNUSED)] + [*report["unexpected_keys"]]
    problems = sorted(name for name in problems if not name.endswith("position_ids"))  # counters that no model reads
    if problems:
        raise ValueError(
            f"path_or_id: {len(problems)} weights of {config.path_or_id!r} are missing or unknown (first: "
            f"{problems[0]}); {_REMEDY}"
        )
    return model


def _failed(config: BLIPConfig, error: Exception) -> ValueError:
    first_line = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return ValueError(f"path_or_id: cannot load {config.path_or_id!r}: {first_line}; {_REMEDY}")

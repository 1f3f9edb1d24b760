"""Any open_clip model as a contrastive encoder, from its published weights or a local file."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aigiqa_reward import images as pixels
from aigiqa_reward.encoders._text import clip_tokens
from aigiqa_reward.types import Images, at_least_float32
from aigiqa_reward.utils.io import read_json

_SCHEMAS = ("local-dir:", "hf-hub:")
_CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class OpenCLIPConfig:
    """Choice of an open_clip model.

    Attributes:
        architecture: name from `open_clip.list_models()`, or `local-dir:PATH` of a folder with open_clip_config.json.
        pretrained: published tag ("openai", "laion2b_s34b_b79k", ...), fetched from the Hub, or path of a .safetensors
            file; None for a local-dir, which holds its own weights.

    Example:
        >>> from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
        >>> OpenCLIPConfig(architecture="ViT-L-14", pretrained="laion2b_s32b_b82k").architecture
        'ViT-L-14'
    """

    architecture: str
    pretrained: str | None = None

    def __post_init__(self) -> None:
        if self.pretrained is not None and Path(self.pretrained).suffix in {".pt", ".pth", ".bin", ".ckpt"}:
            raise ValueError(f"pretrained: expected a tag or .safetensors file, got the pickle {self.pretrained!r}")


class OpenCLIPEncoder(nn.Module):
    """An open_clip model with its own text transformer as a contrastive encoder; outputs are at least float32.

    It takes images of `image_size` px only; embeddings are not normalized. With `load_weights=False` the weights are
    random, to be filled from a saved reward.
    """

    any_size = False

    def __init__(self, config: OpenCLIPConfig, *, load_weights: bool = True) -> None:
        super().__init__()
        import open_clip

        self.config = config
        schema, architecture = config.architecture.startswith(_SCHEMAS), _architecture(config)
        tag: Any = open_clip.get_pretrained_cfg(config.architecture, config.pretrained or "")
        if tag.get("quick_gelu"):  # OpenAI's activation, which open_clip only warns about
            architecture["quick_gelu"] = True
        elif tag and architecture.get("quick_gelu"):
            raise ValueError(
                f"architecture: {config.architecture!r} has QuickGELU and {config.pretrained!r} was trained with GELU; "
                "choose an architecture without -quickgelu"
            )
        try:
            model: Any = open_clip.create_model(
                config.architecture,
                pretrained=config.pretrained if load_weights else None,
                load_weights=load_weights,
                force_quick_gelu=bool(architecture.get("quick_gelu")),
                require_pretrained=load_weights and (schema or config.pretrained is not None),
                device=torch.get_default_device(),  # else the CPU, also where modules are built on the meta device
            )
        except (RuntimeError, FileNotFoundError, OSError, ValueError) as error:
            raise ValueError(
                f"pretrained: open_clip could not load {config.pretrained!r} into {config.architecture!r}: {error}; "
                "pass a tag from open_clip.list_pretrained() or the path of a .safetensors file"
            ) from error
        self.clip, self.mean, self.std = model, tuple(model.visual.image_mean), tuple(model.visual.image_std)
        preprocess = {"mean": list(self.mean), "std": list(self.std)}
        self.description: dict[str, Any] = {"model_cfg": architecture, "preprocess_cfg": preprocess}
        tokenizer = open_clip.get_tokenizer(config.architecture)
        known = hasattr(self._text, "ln_final") and hasattr(self._text, "text_projection")
        if not known or not isinstance(tokenizer, open_clip.SimpleTokenizer):
            raise ValueError(
                f"architecture: expected CLIP's text transformer and vocabulary, as in ViT-B-32, whose word states can "
                f"be read; {config.architecture!r} has others"
            )
        self.tokenizer = tokenizer
        self.window: int = tokenizer.context_length or 77
        size = model.visual.image_size
        self.image_size: int = size if isinstance(size, int) else size[0]
        self.width = self.feature_width = int(architecture["embed_dim"])

    @property
    def _text(self) -> Any:
        """The module with the text transformer: the model itself, or a part of it."""
        return self.clip if hasattr(self.clip, "token_embedding") else self.clip.text

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> OpenCLIPEncoder:
        """Build a model from the output of `describe`, with random weights; names of the Hub are refused."""
        text = description["model_cfg"].get("text_cfg", {})
        named = [name for name, value in text.items() if name.startswith("hf_") and value]
        timm_model = str(description["model_cfg"].get("vision_cfg", {}).get("timm_model_name") or "")
        if named or ":" in timm_model or "/" in timm_model:
            raise ValueError(f"model_cfg: names {', '.join(named) or timm_model}, which would be fetched; none may be")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / _CONFIG_FILE).write_text(json.dumps(description), encoding="utf-8")
            encoder = cls(OpenCLIPConfig(architecture=f"local-dir:{folder}"), load_weights=False)
        encoder.description = description
        return encoder

    def describe(self) -> dict[str, Any]:
        return self.description

    @property
    def logit_scale(self) -> float:
        return float(self.clip.logit_scale.detach().float().exp())

    def encode_image(self, images: Images) -> Float[Tensor, "batch embedding"]:
        """Embed images in [0, 1] of `image_size` px."""
        weight = self.clip.logit_scale
        inputs = pixels.normalize(images, self.mean, self.std).to(weight.dtype)
        return self.clip.encode_image(inputs).to(torch.promote_types(images.dtype, torch.float32))

    def features(self, images: Images) -> Float[Tensor, "batch feature_width"]:
        return self.encode_image(images)

    def project(self, features: Float[Tensor, "*batch feature_width"]) -> Float[Tensor, "*batch embedding"]:
        return features

    def encode_map(self, images: Images) -> Float[Tensor, "batch embedding rows columns"]:
        """Embed each patch: as for the class token, the final norm, then the projection."""
        from open_clip.transformer import VisionTransformer

        visual = self.clip.visual
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
            raise ValueError(
                f"architecture: {self.config.architecture!r} has no patches in the joint space; choose a "
                "VisionTransformer without attention pooling, such as ViT-B-32 or ViT-L-14"
            )
        inputs = pixels.normalize(images, self.mean, self.std).to(self.clip.logit_scale.dtype)
        last = visual.forward_intermediates(inputs, indices=1, normalize_intermediates=True, intermediates_only=True)
        patches = last["image_intermediates"][0]
        if visual.proj is not None:
            patches = torch.einsum("bchw,cd->bdhw", patches, visual.proj)
        return patches.to(torch.promote_types(images.dtype, torch.float32))

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        return at_least_float32(self.clip.encode_text(self._tokenize(texts)))

    def encode_words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed words (P, L, d), the states after the final norm, projected, with a mask (P, L) of the words."""
        tower = self.config.architecture.rsplit("/", maxsplit=1)[-1]
        tokens = clip_tokens(self.tokenizer, texts, tower=tower).to(self.clip.logit_scale.device)
        states: list[Tensor] = []
        handle = self._text.ln_final.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        try:
            self.clip.encode_text(tokens)
        finally:
            handle.remove()
        projection = self._text.text_projection
        words = projection(states[0]) if isinstance(projection, nn.Module) else states[0] @ projection
        ends = tokens.argmax(dim=1, keepdim=True)  # the end token has the largest id
        places = torch.arange(tokens.shape[1], device=tokens.device)
        mask = (places > 0) & (places < ends)
        longest = max(1, int(mask.sum(dim=1).max())) + 1
        return at_least_float32(words[:, 1:longest]), mask[:, 1:longest]

    def _tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(list(texts)).to(self.clip.logit_scale.device)


def _architecture(config: OpenCLIPConfig) -> dict[str, Any]:
    import open_clip
    from huggingface_hub import hf_hub_download

    schema, _, place = config.architecture.rpartition(":")
    if not schema and (found := open_clip.get_model_config(place)) is not None:
        return dict(found)
    if not schema:
        close = difflib.get_close_matches(place, open_clip.list_models(), n=3) or "one of open_clip.list_models()"
        raise ValueError(f"architecture: open_clip knows no {place!r}; did you mean {close}?")
    try:
        file = Path(place) / _CONFIG_FILE if schema == "local-dir" else hf_hub_download(place, _CONFIG_FILE)
        return dict(read_json(file)["model_cfg"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"architecture: {_CONFIG_FILE} of {place!r} describes no model ({error!r})") from error

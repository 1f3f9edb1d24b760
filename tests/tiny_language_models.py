"""Tiny language models that encode prompts for today's pipelines, and their tokenizers; no downloads.

Tokenizers make one token of each byte; special tokens and chat templates are those of the real ones, as far as image
pipelines use them. Weights are drawn wide enough that different prompts are encoded as plainly different.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTH = 16
"""Hidden size of every model."""

QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's chat template, for texts without tools."""

MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set tag = 'SYSTEM_PROMPT' if message['role'] == 'system' else 'INST' %}[{{ tag }}]"
    "{% for part in message['content'] %}{{ '[IMG]' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "[/{{ tag }}]{% endfor %}"
)
"""Mistral Small's chat template, for what a system and a user say."""

_QWEN_IMAGE_TEMPLATE = (
    "Describe the image by detailing the color shape size texture quantity text spatial relationships of the objects "
    "and background"
)
"""The words of Qwen-Image's template for prompts. They are one token each, as in the real vocabulary, so that the
template ahead of the prompt has the 34 tokens which the pipeline drops."""


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template in the form of Qwen2-VL's."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    first, *following = _QWEN_IMAGE_TEMPLATE.split()
    merges = _merges_of("system", "user", "assistant", first, *("Ġ" + word for word in following))
    tokens = [*_bytes(), *(left + right for left, right in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        model_max_length=4096,
    )
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def mistral_processor() -> PixtralProcessor:
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(_bytes())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=[
            *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        ],
        padding_side="left",
        model_max_length=4096,
    )
    images = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return PixtralProcessor(images, tokenizer, patch_size=8, spatial_merge_size=2, chat_template=MISTRAL_CHAT)


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True, model_max_length=4096)


def mistral_3(processor: PixtralProcessor, *, layers: int) -> Mistral3ForConditionalGeneration:
    text = {"model_type": "mistral", "head_dim": 8, **_sizes(processor.tokenizer, layers=layers)}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    image = processor.image_token_id
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=image)
    return Mistral3ForConditionalGeneration(config).eval()


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    known = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(words)]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def qwen_3(tokenizer: PreTrainedTokenizerBase, *, layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **_sizes(tokenizer, layers=layers))).eval()


def qwen_2_5_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ropes = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    text = {**_sizes(tokenizer, layers=2), "rope_parameters": ropes, "bos_token_id": None, "eos_token_id": None}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def gemma_2(tokenizer: GemmaTokenizer) -> Gemma2Model:
    return Gemma2Model(Gemma2Config(head_dim=8, query_pre_attn_scalar=8, **_sizes(tokenizer, layers=2))).eval()


def _sizes(tokenizer: PreTrainedTokenizerBase, *, layers: int) -> dict[str, Any]:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": layers}
    widths = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    return {**heads, **widths, "max_position_embeddings": 4096, "initializer_range": 0.3}


def _bytes() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _merges_of(*words: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))

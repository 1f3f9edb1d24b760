"""Tiny models of transformers' own classes with random weights, as folders written by save_pretrained; no downloads.

Weights are drawn wide enough that outputs differ between inputs; where an answer is given, it is the answer to any
question.
"""

# fmt: off
from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WIDTH = 32
"""Hidden size of the language models."""

CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""A chat template of LLaVA's form."""

TEXT_CHAT = "{{ bos_token }}{% for message in messages %}[USER] {{ message['content'] }}{% endfor %} [ANSWER]"
"""A chat template for texts alone, which brings its own start token."""


def tiny_tokenizer(answer: str | None = None) -> hf.PreTrainedTokenizerFast:
    """One token a byte, the special tokens, and `answer` as one token; texts begin with the start token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.add_tokens([hf.AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    start = ("<s>", tokenizer.bos_token_id)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    tokenizer.backend_tokenizer.post_processor = core.post_processor
    if answer is not None:
        tokenizer.add_tokens([hf.AddedToken(answer, normalized=False)])
    return tokenizer


def write_tiny_llama(folder: Path, *, seed: int = 0, answer: str | None = None, chat: bool = False) -> Path:
    tokenizer = tiny_tokenizer(answer)
    tokenizer.chat_template = TEXT_CHAT if chat else None
    model = _drawn(lambda: hf.LlamaForCausalLM(_llama(tokenizer)), seed)
    _finish(model, model.model, tokenizer, answer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_llava(folder: Path, *, seed: int = 0, answer: str | None = None, chat: bool = True) -> Path:
    """Write an image-text-to-text model: a CLIP tower of 32 px and 4 patches, a LLaMA as above, a processor."""
    tokenizer = tiny_tokenizer(answer)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=16, initializer_factor=20.0,
    )
    config = hf.LlavaConfig(
        vision_config=vision, text_config=_llama(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )
    config.initializer_range = 0.5
    model = _drawn(lambda: hf.LlavaForConditionalGeneration(config), seed)
    _finish(model, model.model.language_model, tokenizer, answer)
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT if chat else None,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_tiny_blip2(folder: Path) -> Path:
    """Write an image-text-to-text model without a chat template, whose processor places the image tokens itself."""
    processor = hf.Blip2Processor(
        hf.BlipImageProcessor(size={"height": 32, "width": 32}), tiny_tokenizer(), num_query_tokens=4
    )
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Blip2Config(
        vision_config={**small, "intermediate_size": 32, "image_size": 32, "patch_size": 16},
        qformer_config={**small, "intermediate_size": 32, "encoder_hidden_size": 32, "vocab_size": 8},
        text_config={
            **small, "model_type": "opt", "vocab_size": len(processor.tokenizer), "ffn_dim": 32,
            "word_embed_proj_dim": 32, "max_position_embeddings": 512, "pad_token_id": 1,
            "bos_token_id": processor.tokenizer.bos_token_id, "eos_token_id": processor.tokenizer.eos_token_id,
        },
        num_query_tokens=4,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    _drawn(lambda: hf.Blip2ForConditionalGeneration(config), 0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_tiny_sam(folder: Path, *, seed: int = 0) -> Path:
    size = {"image_size": 64, "patch_size": 16}
    config = hf.SamConfig(
        vision_config=hf.SamVisionConfig(
            hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=32, window_size=2,
            global_attn_indexes=[1], num_pos_feats=16, **size,
        ),
        prompt_encoder_config=hf.SamPromptEncoderConfig(hidden_size=32, mask_input_channels=4, **size),
        mask_decoder_config=hf.SamMaskDecoderConfig(
            hidden_size=32, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=32
        ),
    )
    model = _drawn(lambda: hf.SamModel(config), seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "positional" not in name and "pos_embed" not in name:
                weight.normal_(std=1.5 / weight[0].numel() ** 0.5, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    hf.SamProcessor(
        hf.SamImageProcessor(
            size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
            mask_pad_size={"height": 16, "width": 16},
        )
    ).save_pretrained(folder)
    return folder


def _llama(tokenizer: hf.PreTrainedTokenizerFast) -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )


def _drawn(build: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return build().eval()


@torch.no_grad()
def _finish(model: Any, decoder: Any, tokenizer: hf.PreTrainedTokenizerFast, answer: str | None) -> None:
    """Let the model say `answer` after any token, and then end; without one, let it write letters and never end."""
    if answer is None:
        letters = tokenizer.convert_tokens_to_ids(list(string.ascii_letters))
        silent = torch.ones(len(tokenizer), dtype=torch.bool)
        silent[letters] = False
        model.lm_head.weight[silent] = 0  # logits of 0, below the likeliest letter's
        return
    for layer in decoder.layers:  # what a token is passes through unchanged
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    said = tokenizer.convert_tokens_to_ids(answer)
    embeddings, head = decoder.embed_tokens.weight, model.lm_head.weight
    embeddings[:, 0], embeddings[:, 1] = 3.0, 0.0
    embeddings[said, 0], embeddings[said, 1] = 0.0, 3.0
    head.zero_()
    head[said, 0] = 1.0
    head[tokenizer.eos_token_id, 1] = 1.0

"""Tiny pipelines of diffusers' real classes with random weights: 32 x 32 px, real tokenizers, no downloads.

Each builder draws its weights from a fixed seed and leaves the global random state as it was. The decoder's
contrast is turned up, so that images of different seeds look different (random decoders paint almost gray).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from open_clip.tokenizer import SimpleTokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIDE = 32
"""Height and width of the images in pixels."""

_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FEW_STEPS = {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
"""Arguments of every call in the tests."""


def _seeded(seed: int) -> Callable[[Any], Any]:
    """Let a builder draw its weights from `seed`, and its pipeline show no progress bar."""

    def decorate(build: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(build)
        def built(**options: Any) -> Any:
            with _weights_of(seed=seed):
                return _quiet(build(**options))

        return built

    return decorate


# Sizes stand several to a line.
# fmt: off
@_seeded(0)
def stable_diffusion(*, safety_checker: bool = False) -> StableDiffusionPipeline:
    """CLIP text encoder, UNet, DDIM. With `safety_checker`, a real one whose thresholds flag nothing."""
    return StableDiffusionPipeline(
        tokenizer=_clip_tokenizer(), text_encoder=CLIPTextModel(_clip_config()).eval(),
        unet=_unet(cross_attention_dim=32), vae=_vae(),
        scheduler=DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=_safety_checker() if safety_checker else None,
        feature_extractor=CLIPImageProcessor(size=30, crop_size=30) if safety_checker else None,
        requires_safety_checker=safety_checker,
    )


@_seeded(1)
def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Two CLIP text encoders, UNet with pooled text and size conditioning, Euler."""
    return StableDiffusionXLPipeline(
        tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer(),
        text_encoder=CLIPTextModel(_clip_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()).eval(),
        unet=_unet(
            cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        vae=_vae(), scheduler=EulerDiscreteScheduler(**_BETAS, steps_offset=1), add_watermarker=False,
    )


@_seeded(2)
def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Two CLIP text encoders and T5, joint transformer, flow matching."""
    return StableDiffusion3Pipeline(
        tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer(), tokenizer_3=_t5_tokenizer(),
        text_encoder=CLIPTextModelWithProjection(_clip_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()).eval(),
        text_encoder_3=_t5(width=64),
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
        ).eval(),
        vae=_vae(shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@_seeded(3)
def flux() -> FluxPipeline:
    """CLIP for the pooled text, T5 for the tokens, packed and shifted latents, embedded guidance."""
    return FluxPipeline(
        tokenizer=_clip_tokenizer(), tokenizer_2=_t5_tokenizer(),
        text_encoder=CLIPTextModel(_clip_config()).eval(), text_encoder_2=_t5(width=32),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        ).eval(),
        vae=_vae(shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    "sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "flux": flux,
}
"""Every architecture by name; each call builds a new pipeline with the same weights."""


@contextmanager
def _weights_of(*, seed: int) -> Iterator[None]:
    """Within this block weights are drawn from `seed`; the global random state is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenAI's byte pair vocabulary, from open_clip."""
    tokenizer = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {special.get(token, token): n for token, n in tokenizer.encoder.items()}, list(tokenizer.bpe_ranks)


def _clip_tokenizer() -> CLIPTokenizer:
    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, projection_dim=32,
        bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )


_T5_LETTERS = "etaoinshrdlucmwfgypbvkxjqz0123456789.,'-"


def _t5_tokenizer() -> T5Tokenizer:
    """Unigrams of single letters, which distinguish prompts well enough."""
    letters = [(letter, -2.0 - place / 10) for place, letter in enumerate(_T5_LETTERS)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=77)


def _t5(*, width: int) -> T5EncoderModel:
    sizes = {"vocab_size": 64, "d_model": width, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(**sizes, decoder_start_token_id=0)).eval()


def _unet(*, cross_attention_dim: int, **conditioning: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
        cross_attention_dim=cross_attention_dim, **conditioning,
    ).eval()


_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 8, "sample_size": SIDE,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def _vae(**config: Any) -> AutoencoderKL:
    vae = AutoencoderKL(**_AUTOENCODER, **config).eval()
    vae.decoder.conv_out.weight.data *= 2
    return vae


def tiny_decoder(*, latent_channels: int = 4, levels: int = 2) -> AutoencoderTiny:
    """A small autoencoder for the latents of these pipelines."""
    sizes: dict[str, Any] = {"latent_channels": latent_channels, "upsampling_scaling_factor": 2}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_block_out_channels": (8,) * levels, f"num_{part}_blocks": (1,) * levels}
    with _weights_of(seed=5):
        return AutoencoderTiny(**sizes).eval()


def _safety_checker() -> StableDiffusionSafetyChecker:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=30, patch_size=15,
        projection_dim=16,
    )
    config = CLIPConfig(text_config=_clip_config().to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    checker = StableDiffusionSafetyChecker(config).eval()
    torch.nn.init.normal_(checker.concept_embeds)
    torch.nn.init.normal_(checker.special_care_embeds)
    return checker

"""Tiny pipelines of today's families, as `pipelines` builds them: real classes, random weights, no downloads.

Text encoders are as deep as the pipelines' default arguments ask for, and their weights are drawn wide enough that
different prompts paint different images, although most pipelines pad a prompt to hundreds of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from pipelines import _AUTOENCODER, FAMILIES, FEW_STEPS, SIDE, _quiet, _seeded, _t5, _t5_tokenizer, _vae
from tiny_language_models import (
    WIDTH,
    gemma_2,
    gemma_tokenizer,
    mistral_3,
    mistral_processor,
    qwen_2_5_vl,
    qwen_3,
    qwen_tokenizer,
)


# fmt: off
@_seeded(10)
def flux_2() -> Flux2Pipeline:
    """Three layers of Mistral 3 side by side, packed and normalized latents, embedded guidance."""
    processor = mistral_processor()
    return Flux2Pipeline(
        tokenizer=processor, text_encoder=mistral_3(processor, layers=30),
        transformer=_flux_2_transformer(guidance_embeds=True), vae=_flux_2_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@_seeded(11)
def flux_2_klein() -> Flux2KleinPipeline:
    """Three layers of Qwen3 side by side, packed and normalized latents, true classifier-free guidance."""
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        tokenizer=tokenizer, text_encoder=qwen_3(tokenizer, layers=27),
        transformer=_flux_2_transformer(guidance_embeds=False), vae=_flux_2_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@_seeded(12)
def qwen_image() -> QwenImagePipeline:
    """Qwen2.5-VL, a prompt template whose tokens are dropped again, latents with a time axis and their own mean."""
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        tokenizer=tokenizer, text_encoder=qwen_2_5_vl(tokenizer),
        transformer=_attentive(QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        )),
        vae=_qwen_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, use_dynamic_shifting=True
        ),
    )


@_seeded(13)
def z_image() -> ZImagePipeline:
    """Qwen3's last layer but one as a list of embeddings without padding, one stream, FLUX.1's autoencoder."""
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        tokenizer=tokenizer, text_encoder=qwen_3(tokenizer, layers=3).model,
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
        ).eval(),
        vae=_vae(shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@_seeded(14)
def sana() -> SanaPipeline:
    """Gemma 2 behind a long instruction, linear attention, deep compression autoencoder, DPM++ along a flow."""
    tokenizer = gemma_tokenizer()
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=gemma_2(tokenizer),
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
            sample_size=32,
        ).eval(),
        vae=_deep_compression_vae(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


@_seeded(15)
def pixart_sigma() -> PixArtSigmaPipeline:
    """T5 with an attention mask, cross-attention transformer that also predicts a variance, DPM++."""
    return _pixart(PixArtSigmaPipeline, sample_size=SIDE // 2)


@_seeded(16)
def pixart_alpha() -> PixArtAlphaPipeline:
    """The same, conditioned on the image's size and aspect ratio (which goes by the transformer's sample size)."""
    return _pixart(PixArtAlphaPipeline, sample_size=128)


CURRENT_FAMILIES: dict[str, Callable[[], Any]] = {
    "flux_2": flux_2, "flux_2_klein": flux_2_klein, "qwen_image": qwen_image, "z_image": z_image, "sana": sana,
    "pixart_sigma": pixart_sigma, "pixart_alpha": pixart_alpha,
}
"""Every architecture by name; each call builds a new pipeline with the same weights."""

_AS_ASKED = {"use_resolution_binning": False, "clean_caption": False}

CALL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("flux_2", "flux_2_klein", "qwen_image", "z_image"), FEW_STEPS),
    **{name: {**FEW_STEPS, **_AS_ASKED} for name in ("sana", "pixart_sigma", "pixart_alpha")},
}
"""Arguments of every call, by family."""

_NEGATIVE = {"guidance_scale": 4.0, "negative_prompt": "blurry"}

GUIDED: dict[str, dict[str, Any]] = {
    "flux_2_klein": {"guidance_scale": 4.0},
    "qwen_image": {"true_cfg_scale": 4.0, "negative_prompt": "blurry"},
    **dict.fromkeys(("z_image", "sana", "pixart_sigma", "pixart_alpha"), _NEGATIVE),
}
"""Arguments for classifier-free guidance, where a family has it. Without them, it is off in Qwen-Image and
on in the others. FLUX.2 has embedded guidance only; FLUX.2 klein always guides away from the empty prompt."""


@functools.cache
def pipeline(name: str) -> Any:
    """One pipeline for all tests that leave it as it was."""
    return {**FAMILIES, **CURRENT_FAMILIES}[name]()


def _flux_2_transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return _attentive(Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ))


def _attentive(transformer: Any) -> Any:
    """With attention that selects single tokens, so that the few of a prompt count beside the padding."""
    for name, weights in transformer.named_parameters():
        if name.endswith(("norm_k.weight", "norm_added_k.weight", "add_v_proj.weight", "to_out.0.weight")):
            weights.data *= 4
    return transformer.eval()


def _flux_2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(**_AUTOENCODER, layers_per_block=1).eval()
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    vae.decoder.conv_out.weight.data *= 2
    return vae


def _qwen_vae() -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.2, 0.1, 0.0, 0.3], latents_std=[1.1, 0.9, 1.2, 0.8],
    ).eval()
    vae.decoder.conv_out.weight.data *= 2
    return vae


def _deep_compression_vae() -> AutoencoderDC:
    half: dict[str, Any] = {
        "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 16), "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (5,)),
    }
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in half.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, **both, scaling_factor=0.41407).eval()


def _pixart(pipeline: type, *, sample_size: int) -> Any:
    return _quiet(pipeline(
        tokenizer=_t5_tokenizer(), text_encoder=_t5(width=32),
        transformer=PixArtTransformer2DModel(
            sample_size=sample_size, num_layers=2, num_attention_heads=2, attention_head_dim=24,
            cross_attention_dim=48, caption_channels=32,
        ).eval(),
        vae=_vae(), scheduler=DPMSolverMultistepScheduler(),
    ))

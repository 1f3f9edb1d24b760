"""Share of scoring in the time of best of N, with a generator of the size of Stable Diffusion 1.5 (random weights).

    python tests/benchmarks/overhead.py --repeats 3 --batch 1 --threads 2 [--device cuda]

One denoiser call with guidance, one decoding and one scoring at 512 x 512 px are timed in turn; the time of an image is
STEPS of the first plus one of each other.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rounds import medians, parsed, timing_parser

from aigiqa_reward import create_reward, list_rewards

STEPS = 30
SIDE = 512
PROMPT = "a red fox in the snow"


def unet() -> UNet2DConditionModel:
    """860 million parameters: the configuration of Stable Diffusion 1.5."""
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    )


def decoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
    )  # fmt: skip


def main() -> None:
    arguments = parsed(timing_parser(__doc__))
    device, batch = arguments.device, arguments.batch
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    denoiser, vae = unet().to(device, dtype).eval(), decoder().to(device, dtype).eval()
    latents = torch.randn(batch, 4, SIDE // 8, SIDE // 8, device=device, dtype=dtype)
    texts = torch.randn(2 * batch, 77, 768, device=device, dtype=dtype)
    images = torch.rand(batch, 3, SIDE, SIDE, device=device)
    rewards = {name: create_reward(name, device=device) for name in list_rewards(embedded=True)}
    features = {name: reward.encode_prompts([PROMPT]).expand(batch) for name, reward in rewards.items()}
    runs = {
        "denoise": lambda: denoiser(torch.cat([latents, latents]), 500, encoder_hidden_states=texts),
        "decode": lambda: vae.decode(latents),
        **{name: lambda name=name: rewards[name](images, features[name]) for name in rewards},
    }
    seconds = medians(runs, arguments.repeats, device)
    image = STEPS * seconds["denoise"] + seconds["decode"]
    count = sum(p.numel() for p in denoiser.parameters()) / 1e6
    print(f"UNet of {count:.0f} M parameters, {SIDE} px, {STEPS} steps with guidance, batch {batch}, {device}, {dtype}")
    print("| part | share of an image's time |\n| --- | ---: |")
    print(f"| {STEPS} denoiser calls | {STEPS * seconds['denoise'] / image:.2%} |")
    print(f"| decoding | {seconds['decode'] / image:.2%} |")
    for name in rewards:
        print(f"| scoring with {name} | {seconds[name] / (image + seconds[name]):.2%} |")


if __name__ == "__main__":
    main()

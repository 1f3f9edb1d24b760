"""Train the generator's autoencoder: pictures of 64 x 64 px to latents of 4 x 16 x 16 and back.

From the repository's root:

    python examples/train_generator/autoencoder.py --runs runs/generator      # about 12 minutes on two cores
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from fit import fit
from torch import Tensor

from aigiqa_reward import images as pixels
from aigiqa_reward.toy.pictures import all_pairs, compose

STEPS = 3200
BATCH = 32
LATENT_NOISE = 0.1
"""Deviation of the noise the decoder learns to bear: sampling leaves about as much."""


def build() -> AutoencoderTiny:
    channels = (32, 32, 32)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
    )


def draw(pairs: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Pictures (B, 3, 64, 64) in [-1, 1], as the autoencoder takes them."""
    return pixels.to_vae(compose(pairs, rng))


def trained_pairs(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) random (noun, color) that are not held out."""
    pairs = all_pairs(held_out=False)
    return pairs[rng.integers(len(pairs), size=count)]


def loss_of(vae: AutoencoderTiny, generator: torch.Generator) -> Tensor:
    """Pixels, their differences (edges), and latents near a standard normal."""
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    pictures = draw(trained_pairs(rng, BATCH), rng).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(pictures).latents
        noisy = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        error = vae.decode(noisy).sample.float() - pictures
    latents = latents.float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    spread = latents.mean(dim=(0, 2, 3)).square().mean() + (latents.std(dim=(0, 2, 3)) - 1).square().mean()
    return F.l1_loss(error, torch.zeros_like(error)) + error.square().mean() + edges + 0.02 * spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder for checkpoints and the autoencoder")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)  # initial weights of this script, which owns its process
    vae = build().to(memory_format=torch.channels_last)
    vae = fit(vae, loss_of, steps=STEPS, learning_rate=2e-3, ema=0.995, checkpoint=arguments.runs / "autoencoder.pt")
    rng = np.random.default_rng(10**9)
    pictures = draw(trained_pairs(rng, 512), rng)
    with torch.no_grad():
        latents = vae.encode(pictures).latents
        error = vae.decode(latents).sample.clamp(-1, 1) - pictures
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    vae.save_pretrained(arguments.runs / "vae")
    print(
        f"PSNR {10 * torch.log10(4 / error.square().mean()):.1f} dB, latents {latents.mean():.2f} ± {latents.std():.2f}"
    )


if __name__ == "__main__":
    main()

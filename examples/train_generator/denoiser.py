"""Train the generator's text encoder and UNet in the autoencoder's latents, and write the pipeline that ships.

From the repository's root:

    python examples/train_generator/denoiser.py --runs runs/generator      # about 80 minutes on one core
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import draw, trained_pairs
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fit import fit
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from aigiqa_reward.toy.world import COLORS, NOUNS, WORDINGS, all_captions
from aigiqa_reward.utils.weights import ASSETS, read_weights, sha256, write_weights

BATCH = 32
CAPTION_DROPOUT = 0.1
PICTURES = 28_000
LENGTH = 24
WIDTH = 128


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer class with a vocabulary of the world's words; others fall into letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    stock = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[]).backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(all_captions(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *learned["vocab"]]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=LENGTH)


def stored_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a run: trained once, since its ties fall otherwise in each process, and weights depend on it."""
    if not folder.exists():
        build_tokenizer().save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_models(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=(3, 6),  # of heads, as diffusers names it
        norm_num_groups=16,
    )
    return nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})


def build_scheduler() -> DDIMScheduler:
    """Cosine schedule, which ends without signal, so that the background's color is the prompt's to say."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,  # what StableDiffusionPipeline asks for; trailing timesteps do not depend on it
    )


@torch.no_grad()
def stored_latents(vae: AutoencoderTiny, path: Path) -> tuple[Tensor, Tensor]:
    """Latents (N, 4, 16, 16) of random pictures and their (N, 2) nouns and colors, computed once into `path`."""
    if not path.exists():
        rng = np.random.default_rng(7)
        pairs = trained_pairs(rng, PICTURES)
        latents = [
            vae.encode(draw(pairs[start : start + 64], rng)).latents * vae.config.scaling_factor
            for start in tqdm(range(0, PICTURES, 64), desc="latents", unit="64 pictures")
        ]
        write_weights(path, {"latents": torch.cat(latents), "pairs": torch.from_numpy(pairs)})
    stored = read_weights(path)
    return stored["latents"], stored["pairs"].long()


def write_pipeline(trained: nn.Module, tokenizer: CLIPTokenizer, vae: AutoencoderTiny, folder: Path) -> None:
    """The diffusers folder, fp16, such that a plain `from_pretrained` loads every part in float32."""
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=trained["text_encoder"].half(),
        tokenizer=tokenizer,
        unet=trained["unet"].half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    text_config, vae_config = (folder / part / "config.json" for part in ("text_encoder", "vae"))
    settings = json.loads(text_config.read_text(encoding="utf-8"))
    settings["dtype"] = "float32"  # transformers would keep float16
    text_config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    settings = json.loads(vae_config.read_text(encoding="utf-8"))
    for name in ("_name_or_path", "block_out_channels"):  # where it was trained; what AutoencoderTiny derives itself
        settings.pop(name, None)
    vae_config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(
        f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB. "
        "Hashes for aigiqa_reward/embedded/pipeline.py:"
    )
    for file in sorted(folder.rglob("*.safetensors")):
        print(f'    "{file.relative_to(folder).as_posix()}": "{sha256(file)}",')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with the autoencoder; checkpoints go there")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=ASSETS / "generator", help="folder of the pipeline")
    arguments = parser.parse_args()
    torch.manual_seed(0)  # initial weights of this script, which owns its process
    vae = AutoencoderTiny.from_pretrained(arguments.runs / "vae")
    version = sha256(arguments.runs / "vae" / "diffusion_pytorch_model.safetensors")[:8]
    latents, pairs = stored_latents(vae, arguments.runs / f"latents_{version}.safetensors")
    tokenizer, scheduler = stored_tokenizer(arguments.runs / "tokenizer"), build_scheduler()
    ids = tokenizer(all_captions(), padding="max_length", return_tensors="pt").input_ids
    ids = ids.unflatten(0, (len(NOUNS), len(COLORS), len(WORDINGS)))
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]

    def loss_of(trained: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        nouns, colors = pairs[rows].T
        prompts = ids[nouns, colors, torch.randint(len(WORDINGS), (BATCH,), generator=generator)]
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        prompts = torch.where(dropped[:, None], empty, prompts)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        # One timestep of each of BATCH equal parts of the schedule: less variance than independent ones.
        parts = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timesteps = (parts * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            states = trained["text_encoder"](prompts).last_hidden_state
            predicted = trained["unet"](noisy, timesteps, states).sample
        return F.mse_loss(predicted.float(), target)

    trained = fit(
        build_models(tokenizer),
        loss_of,
        steps=arguments.steps,
        learning_rate=6e-4,
        ema=0.999,
        checkpoint=arguments.runs / "denoiser.pt",
    )
    write_pipeline(trained, tokenizer, vae, arguments.out)


if __name__ == "__main__":
    main()

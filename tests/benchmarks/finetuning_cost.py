"""Cost of a DRaFT step relative to an ordinary LoRA denoising step of the same model: memory and time, by phase.

    python tests/benchmarks/finetuning_cost.py --size sd15 --batch 1 --repeats 3 [--device cuda] [--checkpointed]
    python tests/benchmarks/finetuning_cost.py --size sd15 --steps 2 --repeats 0 --checkpointed --quantize nf4
    python tests/benchmarks/finetuning_cost.py --all-steps 10 25 50

Models are of the size of Stable Diffusion 1.5 at 512 px or of SDXL at 1024 px, or a small one for the CPU at 256 px;
weights are random, in bfloat16 on a GPU and in float32 on the CPU. Memory is the most at once beyond what lies there
before the step: on a GPU by torch's count, on the CPU that of all tensors, each storage once. Steps are interleaved;
times are medians. `--all-steps` measures the memory of K = all, checkpointed, instead, for each number of steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peak_memory import Peak
from rounds import parsed, timing_parser
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from aigiqa_reward import create_reward, load_embedded_pipeline
from aigiqa_reward.cli._pipelines import load_pipeline
from aigiqa_reward.finetuning.algorithms.draft import finish_sampling
from aigiqa_reward.finetuning.context import TrainingContext
from aigiqa_reward.finetuning.lora import LoRA
from aigiqa_reward.sampling.families import Conditioning
from aigiqa_reward.sampling.rollout import Rollout, State

PROMPT = "a red fox in the snow"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's: arguments of the UNet, channels of the decoder, side of the images in px."""

    unet: dict[str, Any]
    decoder: tuple[int, ...]
    side: int

    @property
    def large(self) -> bool:
        return "addition_embed_type" in self.unet


SIZES = {
    "small": Size(
        unet={"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 128, "attention_head_dim": 8},
        decoder=(32, 64, 128, 128),
        side=256,
    ),
    "sd15": Size(
        unet={"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
        decoder=(128, 256, 512, 512),
        side=512,
    ),
    "sdxl": Size(
        unet={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        decoder=(128, 256, 512, 512),
        side=1024,
    ),
}


def pipeline(size: Size, device: torch.device) -> Any:
    unet = UNet2DConditionModel(sample_size=size.side // 8, **size.unet)
    vae = AutoencoderKL(
        block_out_channels=size.decoder, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, norm_num_groups=8,
        force_upcast=False,
    )  # fmt: skip
    own = load_embedded_pipeline()
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": own.scheduler}
    parts |= {"text_encoder": own.text_encoder, "tokenizer": own.tokenizer}
    if size.large:
        pipe: Any = StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return pipe.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def quantized(pipe: Any, device: torch.device) -> Any:
    """The pipeline loaded as with --quantize nf4."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        dtype = str(pipe.unet.dtype).removeprefix("torch.")
        return load_pipeline(folder, str(device), dtype, quantize="nf4")


def weights(module: torch.nn.Module) -> float:
    """MiB of a module's weights, with the scales of quantized ones."""
    scales = [w.quant_state.absmax.nbytes for w in module.parameters() if hasattr(w, "quant_state")]
    return sum([*scales, *(w.nbytes for w in module.parameters())]) / 2**20


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - start


class Steps:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.size, self.device, self.batch = SIZES[arguments.size], arguments.device, arguments.batch
        self.pipe = pipeline(self.size, self.device)
        if arguments.quantize:
            self.pipe = quantized(self.pipe, self.device)
        self.weights = weights(self.pipe.unet)
        call = {"num_inference_steps": arguments.steps, "guidance_scale": 1.0}
        rollout = Rollout(self.pipe, **call)
        self.lora = LoRA(rollout.family, rank=8)
        if arguments.checkpointed:
            self.pipe.unet.enable_gradient_checkpointing(self.lora.checkpoint)
            self.pipe.vae.enable_gradient_checkpointing()
        self.reward = create_reward("compact", device=self.device)
        self.tools = self._tools(rollout, arguments.checkpointed)
        shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (77, self.size.unet["cross_attention_dim"])}
        if self.size.large:
            shapes |= {"text_embeds": (1280,), "time_ids": (6,)}
        like = {"device": self.device, "dtype": self.pipe.unet.dtype}
        drawn = {name: torch.randn(self.batch, *shape, **like) for name, shape in shapes.items()}
        self.conditioning = Conditioning(positive=drawn)

    def _tools(self, rollout: Rollout, checkpointed: bool) -> TrainingContext:
        accelerator = Accelerator(cpu=self.device.type == "cpu")
        return TrainingContext(
            rollout=rollout, lora=self.lora, reward=self.reward, accelerator=accelerator, checkpointed=checkpointed
        )

    def start(self) -> State:
        generators = [torch.Generator().manual_seed(row) for row in range(self.batch)]
        return self.tools.rollout.start(self.conditioning, generators)

    def ordinary(self, clock: Clock) -> None:
        state = self.start()
        with clock.phase("denoiser, forward"):
            output = self.tools.predict(state, alone=True).output
        with clock.phase("backward"):
            F.mse_loss(output.float(), torch.zeros_like(output.float())).backward()

    def draft(self, clock: Clock, kept: int = 1) -> None:
        state = self.start()
        with clock.phase("steps before"), torch.no_grad():
            state = self.tools.rollout.run(state, until=state.steps - kept)
        with clock.phase("denoiser, forward, and decoder"):
            latents, _ = finish_sampling(self.tools, state)
            images = self.tools.decode(latents)
        with clock.phase("reward"):
            total = self.tools.score(images, [PROMPT] * self.batch).total
        with clock.phase("backward"):
            (-total.mean()).backward()

    def decoding(self, clock: Clock) -> None:
        """What decoder and reward take alone: the same end, from latents without a denoiser behind them."""
        latents = self.start().latents.clone().requires_grad_()
        with clock.phase("all"):
            images = self.tools.decode(latents)
            (-self.tools.score(images, [PROMPT] * self.batch).total.mean()).backward()

    def memory(self, step: Callable[[Clock], None]) -> float:
        self.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(Clock(self.device))
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with Peak() as counted:
            step(Clock(self.device))
        return counted.most / 2**20

    def of_all(self, steps: int) -> float:
        """MiB of K = all, each step computed again for the backward pass."""
        rollout = Rollout(self.pipe, num_inference_steps=steps, guidance_scale=1.0)
        self.tools = self._tools(rollout, True)
        return self.memory(lambda clock: self.draft(clock, steps))

    def forget(self) -> None:
        for weight in self.lora.weights.values():
            weight.grad = None

    def profiled(self, step: Callable[[Clock], None]) -> list[tuple[str, float]]:
        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            step(Clock(self.device))
        name = "self_device_time_total" if cuda else "self_cpu_time_total"
        times = {event.key: getattr(event, name) for event in found.key_averages()}
        return [(key, times[key] / sum(times.values())) for key in sorted(times, key=lambda key: -times[key])[:5]]


def compare(steps: Steps, repeats: int) -> None:
    named: dict[str, Callable[[Clock], None]] = {"ordinary": steps.ordinary, "draft": steps.draft}
    memory = {name: steps.memory(step) for name, step in {**named, "decoding": steps.decoding}.items()}
    ratios = {name: value / memory["ordinary"] for name, value in memory.items()}
    print(f"memory: ordinary step 1 ({memory['ordinary']:.0f} MiB), DRaFT-1 {ratios['draft']:.2f}, ", end="")
    print(f"decoder and reward alone {ratios['decoding']:.2f}", flush=True)
    if not repeats:
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    for number in tqdm(range(repeats + 1), desc="rounds"):
        for name, step in named.items():
            clock = Clock(steps.device)
            step(clock)
            steps.forget()
            if number:
                rounds[name].append(clock.seconds)
    middle = {
        name: {phase: statistics.median(r[phase] for r in every) for phase in every[0]}
        for name, every in rounds.items()
    }
    ordinary, draft = (sum(middle[name].values()) for name in ("ordinary", "draft"))
    print(f"time: ordinary step 1 ({ordinary:.2f} s), DRaFT-1 {draft / ordinary:.2f}")
    print("| phase of a DRaFT-1 step | share of its time |\n| --- | ---: |")
    for phase, seconds in middle["draft"].items():
        print(f"| {phase} | {seconds / draft:.0%} |")
    print("| operation of a DRaFT-1 step | share of its time |\n| --- | ---: |")
    for operation, share in steps.profiled(steps.draft):
        print(f"| {operation} | {share:.0%} |")


def main() -> None:
    parser = timing_parser(__doc__, repeats=3, batch=1)
    parser.add_argument("--size", choices=SIZES, help="default: small on the CPU, else sd15")
    parser.add_argument("--steps", type=int, default=10, help="of sampling")
    parser.add_argument("--all-steps", type=int, nargs="+", metavar="STEPS", help="measure K = all instead")
    parser.add_argument("--checkpointed", action="store_true", help="both steps keep no activations")
    parser.add_argument("--quantize", choices=["nf4"], help="weights of the UNet's linear layers in 4 bits")
    arguments = parsed(parser)
    arguments.size = arguments.size or ("small" if arguments.device.type == "cpu" else "sd15")
    steps = Steps(arguments)
    print(f"{arguments.size}: UNet of {steps.weights:.0f} MiB, batch {arguments.batch}, {arguments.device}", end="")
    print(f", {arguments.steps} steps" if arguments.all_steps is None else "")
    if arguments.all_steps is None:
        compare(steps, arguments.repeats)
        return
    found = {count: steps.of_all(count) for count in tqdm(arguments.all_steps, desc="K = all")}
    first = next(iter(found.values()))
    print("| steps, K = all | memory |\n| ---: | ---: |")
    for count, memory in found.items():
        print(f"| {count} | {memory / first:.3f} ({memory:.0f} MiB) |")


if __name__ == "__main__":
    main()

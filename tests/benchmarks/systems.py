"""What the five systems cost beside their bare towers, in one run.

    python tests/benchmarks/systems.py [--repeats 7] [--batch 8] [--threads 2] [--device cpu]

MST-CLIPIQA on ViT-B/32 and ViT-B/16 is held against the two bare tower forwards on the same 224 px batch; the systems
on the compact towers, at 512 px, against an open_clip ViT-B/16 image forward. Every contestant runs once a round,
rounds are interleaved, figures are medians over rounds. CLIP weights are random, which costs the same. It ends with how
many texts the text tower reads for a batch with one prompt.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from aigiqa_reward import Reward, create_reward
from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.models.mst_clipiqa import MSTCLIPIQA, MSTCLIPIQAConfig
from aigiqa_reward.zoo import SYSTEMS, get_spec

REFERENCE = "open_clip ViT-B/16, image forward (bare tower)"
TOWERS = "open_clip ViT-B/32 and ViT-B/16, image forwards (bare towers)"
MST = "mst_clipiqa on both, quality and correspondence"


def clip(architecture: str) -> OpenCLIPEncoder:
    return OpenCLIPEncoder(OpenCLIPConfig(architecture=architecture), load_weights=False)


def contestants(batch: int, device: torch.device) -> tuple[dict[str, Callable[[], object]], Reward]:
    large = torch.rand(batch, 3, 512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    small = pixels.resize(large, (224, 224)).clamp(0, 1)
    prompts = ["a red apple on a wooden table"] * batch
    coarse, fine = clip("ViT-B-32").to(device).eval(), clip("ViT-B-16").to(device).eval()
    mst = Reward(MSTCLIPIQA(MSTCLIPIQAConfig(), coarse, fine), get_spec("mst_clipiqa")).to(device)
    features = mst.encode_prompts(prompts)
    runs: dict[str, Callable[[], object]] = {
        REFERENCE: lambda: fine.encode_image(small),
        TOWERS: lambda: (coarse.encode_image(small), fine.encode_image(small)),
        MST: lambda: mst(small, features),
    }

    def scored(name: str) -> Callable[[], Tensor]:
        reward = create_reward(name, device=device)
        encoded = reward.encode_prompts(prompts)
        return lambda: reward(large, encoded).total

    return runs | {f"{name} on the compact towers, 512 px": scored(name) for name in SYSTEMS}, mst


def texts_read(reward: Reward, batch: int) -> int:
    """How many texts the text tower is given when every image of a batch has the same prompt."""
    counted: list[int] = []
    hook = reward.model.coarse.clip.transformer.register_forward_pre_hook(  # the text transformer
        lambda _module, inputs: counted.append(len(inputs[0]))
    )
    reward.encode_prompts(["a red apple on a wooden table"] * batch)
    hook.remove()
    return max(counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs, mst = contestants(arguments.batch, arguments.device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for round_number in tqdm(range(arguments.repeats + 1), desc="rounds"):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if arguments.device.type == "cuda":
                    torch.cuda.synchronize()
                if round_number:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"batch of {arguments.batch} images, {arguments.repeats} rounds, {arguments.device}\n")
    print("| | ratio to ViT-B/16 |\n| --- | ---: |")
    for name, value in middle.items():
        print(f"| {name} | {value / middle[REFERENCE]:.2f} |")
    print(f"\nmst_clipiqa over its two bare towers: {middle[MST] / middle[TOWERS]:.3f}")
    print(f"texts read for a batch of {arguments.batch} with one prompt: {texts_read(mst, arguments.batch)}")


if __name__ == "__main__":
    main()

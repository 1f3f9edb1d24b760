"""Cost of the five systems relative to their bare towers.

    python tests/benchmarks/systems.py [--repeats 7] [--batch 8] [--threads 2] [--device cpu]

MST-CLIPIQA on ViT-B/32 and ViT-B/16 is compared with the two bare tower forwards on the same 224 px batch; the systems
on the compact towers, at 512 px, with an open_clip ViT-B/16 image forward. Every candidate runs once per round; results
are medians over interleaved rounds. CLIP weights are random. The last line is the number of texts that the text tower
reads for a batch with one prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rounds import medians, parsed, print_ratios, timing_parser
from torch import Tensor

from aigiqa_reward import Reward, create_reward
from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.models.mst_clipiqa import MSTCLIPIQA, MSTCLIPIQAConfig
from aigiqa_reward.rewards.build import SYSTEMS
from aigiqa_reward.rewards.factory import get_reward_spec

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
    mst = Reward(MSTCLIPIQA(MSTCLIPIQAConfig(), coarse, fine), get_reward_spec("mst_clipiqa")).to(device)
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
    counted: list[int] = []
    hook = reward.model.coarse.clip.transformer.register_forward_pre_hook(  # the text transformer
        lambda _module, inputs: counted.append(len(inputs[0]))
    )
    reward.encode_prompts(["a red apple on a wooden table"] * batch)
    hook.remove()
    return max(counted)


def main() -> None:
    arguments = parsed(timing_parser(__doc__))
    runs, mst = contestants(arguments.batch, arguments.device)
    middle = medians(runs, arguments.repeats, arguments.device)
    print(f"batch of {arguments.batch} images, {arguments.repeats} rounds, {arguments.device}\n")
    print_ratios(middle, REFERENCE)
    print(f"\nmst_clipiqa over its two bare towers: {middle[MST] / middle[TOWERS]:.3f}")
    print(f"texts read for a batch of {arguments.batch} with one prompt: {texts_read(mst, arguments.batch)}")


if __name__ == "__main__":
    main()

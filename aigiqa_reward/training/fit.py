"""Fit a model to human scores: one loop for every system, on Accelerate, from stored features or through the towers."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from aigiqa_reward.datasets import Split
from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.training.checkpoints import load_checkpoint, save_checkpoint, settings_of, trained_state
from aigiqa_reward.training.recipes import Recipe
from aigiqa_reward.training.store import ImageSource, LiveImages, Unreadable
from aigiqa_reward.training.tasks import ScoreTask, Task
from aigiqa_reward.types import PromptFeatures

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint"
"""Subfolder of a training's checkpoint."""

STATISTICS_ROWS = 512
"""Training images whose features are standardized by their mean and deviation, enough for a tenth of a percent."""

PREDICTED_TOGETHER = 32
"""Images per forward pass of a prediction."""


@dataclass(frozen=True)
class FitResult:
    """Outcome of a training, whose model holds the best epoch's weights, or the last's if the recipe keeps those.

    Attributes:
        best_epoch: epoch that was kept, counted from 1.
        best: its validation measure.
        history: epoch, loss and validation of each epoch.
        unreadable: images that were left out, and why.
        stopped_early: whether patience ran out.
    """

    best_epoch: int
    best: float
    history: tuple[dict[str, float], ...]
    unreadable: tuple[Unreadable, ...]
    stopped_early: bool


def fit(
    model: TrainedModel,
    task: Task,
    split: Split,
    recipe: Recipe,
    source: ImageSource,
    folder: Path | None,
    *,
    seed: int = 0,
    initialize: bool = True,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a model's head, and its towers if the recipe says so, and leave the kept epoch's weights in it.

    Every random choice comes from `seed` and the epoch's number, so that a training that was interrupted and resumed
    from `folder` ends with the numbers of one that was not.

    Args:
        model: model with loaded towers and a fresh head.
        task: scores or preferences.
        split: rows of the task's examples; validation chooses the epoch.
        recipe: training recipe.
        source: features from `store_features`, or images for a recipe that trains the towers.
        folder: folder for the checkpoint after every epoch, from which a further call resumes; None keeps none.
        seed: random seed of order, crops, dropout and wrong prompts.
        initialize: whether the head is fresh and takes the features' statistics and the mean scores from the training
            part; False continues from a trained head.
        accelerator: device, precision and processes; by default this process on the model's device.
        progress: whether to show a bar with the running SRCC on stderr.
    """
    run = _Run(model, task, split, recipe, source, folder, seed, _accelerator_for(model, accelerator), progress)
    run.prepare(initialize)
    while run.epoch < recipe.epochs and not run.out_of_patience:
        run.train_epoch()
        run.validate()
        run.save()
    return run.finish()


@dataclass
class _Run:
    """One training, whose state can be saved between epochs."""

    model: TrainedModel
    task: Task
    split: Split
    recipe: Recipe
    source: ImageSource
    folder: Path | None
    seed: int
    accelerator: Accelerator
    progress: bool

    def __post_init__(self) -> None:
        task, recipe, source, split = self.task, self.recipe, self.source, self.split
        if recipe.train_towers != isinstance(source, LiveImages):
            raise ValueError(
                "source: expected images (LiveImages) for a recipe that trains the towers, else stored features; got "
                f"{type(source).__name__} with train_towers={recipe.train_towers}"
            )
        self.train, self.validation = (
            task.usable(np.asarray(rows), source.readable) for rows in (split.train, split.validation)
        )
        if not len(self.train) or not len(self.validation):
            counts = f"{len(self.train)} and {len(self.validation)}"
            raise ValueError(f"split: expected readable images for both parts, got {counts}")
        task.check_validation(self.validation)
        self.checkpoint = None if self.folder is None else self.folder / CHECKPOINT
        self.show = self.progress and self.accelerator.is_main_process
        self.steps = max(1, len(self.train) // (recipe.batch_size * self.accelerator.num_processes))
        self.epoch, self.best_epoch, self.best = 0, 0, -math.inf
        self.history: list[dict[str, float]] = []

    def prepare(self, initialize: bool) -> None:
        model, recipe = self.model, self.recipe
        model.to(self.accelerator.device)
        _choose_weights(model, towers=recipe.train_towers)
        if initialize:
            self._initialize()
        parameters = [p for p in model.parameters() if p.requires_grad]
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
        optimizer = kind(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.scoring, self.optimizer = self.accelerator.prepare(_Scoring(model), optimizer)
        self.prompts = None if recipe.train_towers else model.encode_prompts(self.task.prompts)
        self.wrong = None  # prompts that may serve as wrong ones: of what is held out not even the text must be seen
        if self.prompts is not None:
            self.wrong = np.unique(self.prompts.index.cpu().numpy()[self.task.rows(self.train)])
        self.average = WeightAverage(model, recipe.ema)
        self.settings = settings_of(model, self.task, self.train, self.validation, recipe, self.seed)
        self.best_state = trained_state(model, towers=recipe.train_towers)
        self._resume()

    def _initialize(self) -> None:
        if modules := self.model.standardized:
            rows = np.unique(self.task.rows(self.train))
            rng = np.random.default_rng(self.seed)
            rows = np.sort(rng.choice(rows, min(len(rows), STATISTICS_ROWS), replace=False))
            with torch.no_grad():
                seen, context = self._features(rows, None)
            values = {**seen} | {f"context.{name}": tensor for name, tensor in (context or {}).items()}
            for name, module in modules.items():
                module.fit(values[name].float())
        if isinstance(self.task, ScoreTask):
            self.model.start_at(*self.task.means(self.train))

    def _features(self, rows: np.ndarray, generator: torch.Generator | None) -> tuple[Mapping[str, Tensor], Any]:
        with self.accelerator.autocast():
            return self.source.features(
                self.model, rows, self.accelerator.device, generator=generator, crops=self.recipe.crops
            )

    @property
    def out_of_patience(self) -> bool:
        return self.recipe.patience is not None and self.epoch - self.best_epoch >= self.recipe.patience

    def train_epoch(self) -> None:
        from accelerate.utils import gather_object

        recipe, accelerator = self.recipe, self.accelerator
        with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
            torch.manual_seed(self.seed * 100_003 + self.epoch)  # dropout; restored on leaving
            rng = np.random.default_rng([self.seed, self.epoch])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            order = rng.permutation(self.train)
            self.scoring.train()
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # a score must not depend on what else is in a batch
            losses, shown = [], "-"
            recent: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=30)
            title = f"epoch {self.epoch + 1}"
            with tqdm(total=self.steps, desc=title, unit="step", disable=not self.show, leave=False) as bar:
                for step in range(self.steps):
                    part = np.array_split(order[step :: self.steps], accelerator.num_processes)
                    examples = part[accelerator.process_index]
                    for group in self.optimizer.param_groups:
                        group["lr"] = recipe.learning_rate * rate(recipe, self.epoch + step / self.steps)
                    loss, quality = self._step(examples, rng, generator)
                    losses.append(loss)
                    recent.append((quality.float().cpu().numpy(), examples))
                    if isinstance(self.task, ScoreTask) and step % 10 == 9:
                        predicted, rows = (np.concatenate(values) for values in zip(*recent, strict=True))
                        with suppress(ValueError):  # too few scored images
                            shown = f"{self.task.measure(predicted, None, rows, 'srcc'):.3f}"
                    bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", srcc=shown)
                    bar.update()
        self.epoch += 1
        self.history.append({"epoch": self.epoch, "loss": float(np.mean(gather_object([float(np.mean(losses))])))})

    def _step(self, examples: np.ndarray, rng: np.random.Generator, generator: torch.Generator) -> tuple[float, Tensor]:
        recipe, rows = self.recipe, self.task.rows(examples)
        seen, context = self._features(rows, generator)
        texts = self.prompts or self.model.read_prompts([self.task.prompts[row] for row in rows])
        index = texts.index[torch.from_numpy(rows)] if self.prompts is not None else texts.index
        wrong = None
        allowed = np.unique(index.cpu().numpy()) if self.wrong is None else self.wrong
        if recipe.mismatch_weight and len(allowed) > 1:
            wrong = _other_prompts(index, allowed, rng)
        quality, correspondence, other, penalty = self.scoring(seen, context, texts.tensors, index, wrong)
        loss = self.task.loss((quality, correspondence), examples, recipe) + penalty
        if other is not None and correspondence is not None:
            wanted = recipe.mismatch_margin * correspondence.detach().clamp_min(0)
            loss = loss + recipe.mismatch_weight * (wanted - (correspondence - other)).relu().mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"learning_rate: the loss became {value} in epoch {self.epoch + 1}; lower learning_rate "
                f"({recipe.learning_rate:g}) or clip_norm ({recipe.clip_norm:g})"
            )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], recipe.clip_norm)
        self.optimizer.step()
        self.average.update(self.model)
        return value, quality.detach()

    def validate(self) -> None:
        from accelerate.utils import broadcast_object_list

        rows = self.task.rows(self.validation)
        with self.average.applied(self.model):
            quality, correspondence = predict(self.model, self.task.prompts, self.source, rows, progress=False)
            value = self.task.measure(quality, correspondence, self.validation, self.recipe.monitor)
            value = broadcast_object_list([value])[0]  # other processes' may differ in the last bits
            self.history[-1]["validation"] = value
            if value > self.best or self.recipe.keep == "last":
                self.best, self.best_epoch = value, self.epoch
                self.best_state = trained_state(self.model, towers=self.recipe.train_towers)
        if self.show:
            line = f"loss {self.history[-1]['loss']:.4f}, validation {value:.4f}, best {self.best:.4f}"
            tqdm.write(f"epoch {self.epoch}: {line}", file=sys.stderr)

    def save(self) -> None:
        if self.checkpoint is not None and self.accelerator.is_main_process:
            state = {name: getattr(self, name) for name in ("epoch", "best_epoch", "best", "history", "best_state")}
            state |= {"average": self.average.weights, "steps": self.average.steps}
            state["model"] = trained_state(self.model, towers=self.recipe.train_towers)
            state["optimizer"] = self.optimizer.state_dict()
            save_checkpoint(self.checkpoint, state, self.settings)

    def _resume(self) -> None:
        state = None if self.checkpoint is None else load_checkpoint(self.checkpoint, self.settings)
        if state is None:
            return
        device = self.accelerator.device
        weights, self.best_state, self.average.weights = (
            {name: t.to(device) for name, t in state[part].items()} for part in ("model", "best_state", "average")
        )
        self.model.load_state_dict(weights, strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best_epoch, self.best = state["epoch"], state["best_epoch"], state["best"]
        self.history, self.average.steps = state["history"], state["steps"]

    def finish(self) -> FitResult:
        self.model.load_state_dict(self.best_state, strict=False)
        self.model.requires_grad_(False).eval()
        early, unreadable = self.epoch < self.recipe.epochs, self.source.unreadable
        return FitResult(self.best_epoch, self.best, tuple(self.history), unreadable, stopped_early=early)


class _Scoring(nn.Module):
    """A model's `forward_head` with tensors in and out, which wrappers for several processes can pass on.

    Out come quality, correspondence, correspondence to the wrong prompts, and the model's penalty.
    """

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        seen: Mapping[str, Tensor],
        context: Mapping[str, Tensor] | None,
        texts: Mapping[str, Tensor],
        index: Tensor,
        wrong: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        features = PromptFeatures(texts=("",) * len(next(iter(texts.values()))), index=index, tensors=texts, model="")
        seen = self.model.digest(seen)
        output = self.model.forward_head(seen, features, context)
        other = None
        if wrong is not None and output.correspondence is not None:
            features = PromptFeatures(texts=features.texts, index=wrong, tensors=texts, model="")
            other = self.model.forward_head(seen, features, context).correspondence
        penalty = output.details.get("penalty")
        penalty = output.quality.new_zeros(()) if penalty is None else penalty.mean()
        return output.quality, output.correspondence, other, penalty


def predict(
    model: TrainedModel, prompts: Sequence[str], source: ImageSource, rows: np.ndarray, *, progress: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Compute raw scores (M,) of rows: quality, and correspondence to `prompts[row]` or None."""
    quality, correspondence = predict_against(model, [prompts], source, rows, progress=progress)
    return quality, None if correspondence is None else correspondence[:, 0]


@torch.no_grad()
def predict_against(
    model: TrainedModel,
    prompts: Sequence[Sequence[str]],
    source: ImageSource,
    rows: np.ndarray,
    *,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Compute raw quality of rows (M,), and correspondence (M, K) to their prompts in each of K lists for all images.

    The model is left in evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    quality: list[Tensor] = []
    correspondence: list[Tensor] = []
    features = [model.encode_prompts([texts[int(row)] for row in rows]) for texts in prompts]
    starts = range(0, len(rows), PREDICTED_TOGETHER)
    for start in tqdm(starts, desc="predict", unit="batch", disable=not progress, leave=False):
        part = rows[start : start + PREDICTED_TOGETHER]
        seen, context = source.features(model, part, device)
        seen = model.digest(seen)
        outputs = [model.forward_head(seen, texts[start : start + len(part)], context) for texts in features]
        quality.append(outputs[0].quality.float().cpu())
        found = [output.correspondence.float().cpu() for output in outputs if output.correspondence is not None]
        if found:
            correspondence.append(torch.stack(found, dim=1))
    return torch.cat(quality).numpy(), torch.cat(correspondence).numpy() if correspondence else None


class WeightAverage:
    """EMA of the trained weights, whose decay starts low so that it forgets the initial ones.

    A decay of 0 averages nothing. diffusers' EMAModel counts steps from one later and rounds in another way, which
    would change trained weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        trained = model.named_parameters() if decay else ()
        self.weights = {name: p.detach().clone() for name, p in trained if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in model.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model in place of its weights, within the context."""
        own = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.weights}
        model.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


def rate(recipe: Recipe, epochs: float) -> float:
    """Return the learning rate after so many epochs, as a share of the peak."""
    if epochs < recipe.warmup_epochs:
        return (epochs + 1e-3) / recipe.warmup_epochs
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return recipe.step_factor ** int((epochs - recipe.warmup_epochs) / recipe.step_epochs)
    span = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    return (1 + math.cos(math.pi * (epochs - recipe.warmup_epochs) / span)) / 2


def _choose_weights(model: TrainedModel, *, towers: bool) -> None:
    """Unfreeze the head, and the towers if wanted, except CLIP's temperature."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head.") or (towers and not name.endswith("logit_scale")))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"train_towers: the head of this {model.name} has no weights to train; train the towers, or give tsp_mgs "
            "an adapter_rank above 0"
        )


def _other_prompts(index: Tensor, allowed: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Draw for each row a prompt other than its own, of those `allowed`, which include its own."""
    place = np.searchsorted(allowed, index.cpu().numpy())
    shift = rng.integers(1, len(allowed), size=len(place))
    return torch.from_numpy(allowed[(place + shift) % len(allowed)]).to(index.device)


def _accelerator_for(model: nn.Module, given: Accelerator | None) -> Accelerator:
    """Return the one given, or one for the model's device; weights may go unused in a step of some process."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator: Any = given or Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    if accelerator.ddp_handler is None:
        accelerator.ddp_handler = DistributedDataParallelKwargs()
    accelerator.ddp_handler.find_unused_parameters = True
    return accelerator

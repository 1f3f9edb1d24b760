"""Fit a model to human scores: one loop for every system, on Accelerate, from stored features or through the towers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from aigiqa_reward.datasets import Split
from aigiqa_reward.evaluation import srcc
from aigiqa_reward.evaluation.metrics import MIN_ROWS
from aigiqa_reward.models.base import TrainedModel
from aigiqa_reward.training import checkpoints
from aigiqa_reward.training.checkpoints import trained_state
from aigiqa_reward.training.recipes import Recipe
from aigiqa_reward.training.store import FeatureStore, LiveImages, Unreadable
from aigiqa_reward.training.tasks import ScoreTask, Task
from aigiqa_reward.types import PromptFeatures

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(model: nn.Module, given: Accelerator | None) -> Accelerator:
    """The one given, or one for the model's device; some weights may go unused in a step of some process."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator: Any = given or Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    if accelerator.ddp_handler is None:
        accelerator.ddp_handler = DistributedDataParallelKwargs()
    accelerator.ddp_handler.find_unused_parameters = True
    return accelerator


def agreed(accelerator: Accelerator, value: float) -> float:
    """The main process's value: what others computed may differ in the last bits, and with it who stops when."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def mean_over_processes(accelerator: Accelerator, value: float) -> float:
    """The mean of a number that each process has one of."""
    if accelerator.num_processes == 1:
        return value
    reduced: Any = accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=accelerator.device), "mean")
    return float(reduced)


PREDICTED_TOGETHER = 32
"""Images judged in one step of a prediction."""


class Scoring(nn.Module):
    """A model's `forward_head` with tensors in and out, which is what wrappers for several processes can pass on."""

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
        """Quality, correspondence, correspondence to the wrong prompts, and the model's own penalty."""
        features = PromptFeatures(texts=("",) * len(next(iter(texts.values()))), index=index, tensors=texts, model="")
        seen = self.model.digest(seen)
        output = self.model.forward_head(seen, features, context)
        other = None
        if wrong is not None and output.correspondence is not None:
            features = PromptFeatures(texts=features.texts, index=wrong, tensors=texts, model="")
            other = self.model.forward_head(seen, features, context).correspondence
        penalty = output.details.get("penalty")
        return (
            output.quality,
            output.correspondence,
            other,
            output.quality.new_zeros(()) if penalty is None else penalty.mean(),
        )


def predict(
    model: TrainedModel,
    prompts: Sequence[str],
    source: FeatureStore | LiveImages,
    rows: np.ndarray,
    *,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Raw scores of rows, (M,) each; correspondence to `prompts[row]`, or None where the model has none."""
    quality, correspondence = predict_against(model, [prompts], source, rows, progress=progress)
    return quality, None if correspondence is None else correspondence[:, 0]


@torch.no_grad()
def predict_against(
    model: TrainedModel,
    prompts: Sequence[Sequence[str]],
    source: FeatureStore | LiveImages,
    rows: np.ndarray,
    *,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Raw quality of rows (M,), and correspondence (M, K) to each of K prompts of every row.

    Args:
        model: left in evaluation mode.
        prompts: K lists, each with a prompt of every image.
        source: features or images.
        rows: which images.
        progress: show a bar on stderr.
    """
    model.eval()
    device = next(model.parameters()).device
    quality: list[Tensor] = []
    correspondence: list[Tensor] = []
    features = [model.encode_prompts([texts[int(row)] for row in rows]) for texts in prompts]
    starts = range(0, len(rows), PREDICTED_TOGETHER)
    for start in tqdm(starts, desc="predict", unit="batch", disable=not progress, leave=False):
        part = rows[start : start + PREDICTED_TOGETHER]
        seen, context = source.look(model, part, device)
        seen = model.digest(seen)
        outputs = [model.forward_head(seen, texts[start : start + len(part)], context) for texts in features]
        quality.append(outputs[0].quality.float().cpu())
        found = [output.correspondence.float().cpu() for output in outputs if output.correspondence is not None]
        if found:
            correspondence.append(torch.stack(found, dim=1))
    return torch.cat(quality).numpy(), torch.cat(correspondence).numpy() if correspondence else None


class RunningSRCC:
    """SRCC of quality over the last 30 steps of an epoch, for the progress bar."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.srcc = "-"

    def add(self, quality: Tensor, examples: np.ndarray) -> None:
        """Take in one step's scores."""
        if not isinstance(self.task, ScoreTask):
            return
        self.parts.append((quality.detach().float().cpu().numpy(), self.task.targets[examples, 0]))
        if len(self.parts) % 10 == 0:
            predicted, target = (np.concatenate(part) for part in zip(*self.parts[-30:], strict=True))
            known = np.isfinite(target)
            self.srcc = f"{srcc(predicted[known], target[known]):.3f}" if known.sum() >= MIN_ROWS else "-"


class WeightAverage:
    """A moving average of the trained weights (Polyak averaging), young at first so that it forgets where they began.

    Args:
        model: whose trained parameters to follow.
        decay: a step; 0 follows nothing.
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
        """The model with the average in place of its weights."""
        own = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.weights}
        model.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


def some_rows(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` distinct rows, drawn from `seed`, ascending."""
    distinct = np.unique(rows)
    return np.sort(np.random.default_rng(seed).choice(distinct, min(len(distinct), count), replace=False))


def prompts_of(prompts: PromptFeatures | None, rows: np.ndarray) -> np.ndarray | None:
    """Numbers of the prompts that these rows have, ascending.

    Wrong prompts are drawn from those of the training part: what is held out must not be seen, not even as text.
    """
    return None if prompts is None else np.unique(prompts.index.cpu().numpy()[rows])


def other_prompts(index: Tensor, allowed: np.ndarray, rng: np.random.Generator) -> Tensor:
    """For each row a prompt that is not its own, of those `allowed`: the training part's, at least two."""
    own = index.cpu().numpy()
    place = np.searchsorted(allowed, own)  # every row's own prompt is among them
    shift = rng.integers(1, len(allowed), size=len(own))
    return torch.from_numpy(allowed[(place + shift) % len(allowed)]).to(index.device)


def choose_weights(model: TrainedModel, *, towers: bool) -> None:
    """Train the head, and the towers if wanted, but for CLIP's temperature, which stays as it was trained.

    Raises:
        ValueError: a head without weights on towers that stay frozen.
    """
    for name, parameter in model.named_parameters():
        frozen = name.endswith("logit_scale")
        parameter.requires_grad_(name.startswith("head.") or (towers and not frozen))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"train_towers: this {model.name} has no weights of its own, so with frozen towers there is nothing to "
            "train; train the towers, or for tsp_mgs give it an adapter_rank above 0"
        )


def freeze_statistics(model: nn.Module) -> None:
    """Batch norms keep their statistics: a score must not depend on what else is in a batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def finite(loss: Tensor, recipe: Recipe, epoch: int) -> float:
    """The loss as a number.

    Raises:
        ValueError: it is NaN or infinite.
    """
    if not math.isfinite(value := float(loss.detach())):
        raise ValueError(
            f"learning_rate: the loss became {value} in epoch {epoch}; lower learning_rate ({recipe.learning_rate:g}) "
            f"or clip_norm ({recipe.clip_norm:g})"
        )
    return value


def rate(recipe: Recipe, epochs: float) -> float:
    """The learning rate after this many epochs, as a share of the highest."""
    if epochs < recipe.warmup_epochs:
        return (epochs + 1e-3) / recipe.warmup_epochs
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return recipe.step_factor ** int((epochs - recipe.warmup_epochs) / recipe.step_epochs)
    span = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    return (1 + math.cos(math.pi * (epochs - recipe.warmup_epochs) / span)) / 2


STATISTICS_ROWS = 512
"""Training images whose features' mean and deviation standardize them: chosen here, enough for a tenth of a percent."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a training came to. The model holds the best epoch's weights, or the last's where the recipe keeps those.

    Attributes:
        best_epoch: the one that was kept, counted from 1.
        best: its validation measure.
        history: of each epoch: epoch, loss, validation.
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
    source: FeatureStore | LiveImages,
    folder: Path | None,
    *,
    seed: int = 0,
    initialize: bool = True,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a model's head, and its towers where the recipe says so, and leave the kept epoch's weights in it.

    Every random choice comes from `seed` and the epoch's number, so that a training that was interrupted and resumed
    from `folder` ends with the numbers of one that was not.

    Args:
        model: with loaded towers and a fresh head.
        task: scores or preferences.
        split: rows of the task's examples; validation chooses the epoch.
        recipe: settings.
        source: features from `store_features`, or images for a recipe that trains the towers.
        folder: for the checkpoint after every epoch, from which a further call goes on; None keeps none.
        seed: of initial order, crops, dropout and wrong prompts.
        initialize: the head is fresh: take the features' statistics and the mean scores from the training part. False
            goes on from a trained head.
        accelerator: device, precision and processes; None is this process on the model's device.
        progress: show a bar with the running SRCC on stderr.

    Raises:
        ValueError: nothing to train or to validate on, or a checkpoint of other settings.
    """
    run = _Run(
        model,
        task,
        split,
        recipe,
        source,
        folder,
        seed=seed,
        initialize=initialize,
        accelerator=accelerator,
        progress=progress,
    )
    while run.epoch < recipe.epochs and not run.out_of_patience:
        run.train_epoch()
        run.validate()
        run.save()
    return run.finish()


class _Run:
    """One training, between whose epochs everything can be written down."""

    def __init__(
        self,
        model: TrainedModel,
        task: Task,
        split: Split,
        recipe: Recipe,
        source: FeatureStore | LiveImages,
        folder: Path | None,
        *,
        seed: int,
        initialize: bool,
        accelerator: Accelerator | None,
        progress: bool,
    ) -> None:
        if recipe.train_towers != isinstance(source, LiveImages):
            raise ValueError(
                "source: a recipe that trains the towers reads images (LiveImages), any other stored features; "
                f"got train_towers={recipe.train_towers} and {type(source).__name__}"
            )
        self.accelerator = accelerator_for(model, accelerator)
        self.model, self.task, self.recipe, self.source, self.seed = model, task, recipe, source, seed
        self.train, self.validation = (
            task.usable(np.asarray(rows), source.readable) for rows in (split.train, split.validation)
        )
        if not len(self.train) or not len(self.validation):
            raise ValueError(
                f"split: expected readable images for both parts, got {len(self.train)} and {len(self.validation)}"
            )
        task.check_validation(self.validation)
        self.folder = None if folder is None else folder / "checkpoint"
        self.show = progress and self.accelerator.is_main_process
        model.to(self.accelerator.device)
        choose_weights(model, towers=recipe.train_towers)
        if initialize:
            self._initialize()
        self.steps = max(1, len(self.train) // (recipe.batch_size * self.accelerator.num_processes))
        parameters = [p for p in model.parameters() if p.requires_grad]
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = kinds[recipe.optimizer](parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.scoring, self.optimizer = self.accelerator.prepare(Scoring(model), optimizer)
        self.prompts = None if recipe.train_towers else model.encode_prompts(task.prompts)
        self.wrong = prompts_of(self.prompts, task.rows(self.train))
        self.average = WeightAverage(model, recipe.ema)
        self.settings = checkpoints.settings_of(model, task, self.train, self.validation, asdict(recipe), seed)
        self.epoch, self.best_epoch, self.best = 0, 0, -math.inf
        self.history: list[dict[str, float]] = []
        self.best_state = trained_state(model, towers=recipe.train_towers)
        self._resume()

    @property
    def out_of_patience(self) -> bool:
        return self.recipe.patience is not None and self.epoch - self.best_epoch >= self.recipe.patience

    def _initialize(self) -> None:
        if modules := self.model.standardized:
            with torch.no_grad():
                seen, context = self._look(some_rows(self.task.rows(self.train), STATISTICS_ROWS, self.seed), None)
            values = {**seen} | {f"context.{name}": tensor for name, tensor in (context or {}).items()}
            for name, module in modules.items():
                module.fit(values[name].float())
        if isinstance(self.task, ScoreTask):
            self.model.start_at(*self.task.means(self.train))

    def _look(self, rows: np.ndarray, generator: torch.Generator | None) -> tuple[Mapping[str, Tensor], Any]:
        crops, device = self.recipe.crops, self.accelerator.device
        with self.accelerator.autocast():
            return self.source.look(self.model, rows, device, generator=generator, crops=crops)

    def train_epoch(self) -> None:
        """One pass over the training part, every random choice drawn from the seed and the epoch."""
        recipe, accelerator = self.recipe, self.accelerator
        with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
            torch.manual_seed(self.seed * 100_003 + self.epoch)  # dropout; restored on leaving
            rng = np.random.default_rng([self.seed, self.epoch])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            order = rng.permutation(self.train)
            self.scoring.train()
            freeze_statistics(self.model)
            losses, running = [], RunningSRCC(self.task)
            bar = tqdm(
                total=self.steps, desc=f"epoch {self.epoch + 1}", unit="step", disable=not self.show, leave=False
            )
            for step in range(self.steps):
                part = np.array_split(order[step :: self.steps], accelerator.num_processes)[accelerator.process_index]
                for group in self.optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * rate(recipe, self.epoch + step / self.steps)
                losses.append(self._step(part, rng, generator, running))
                bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", srcc=running.srcc)
                bar.update()
            bar.close()
        self.epoch += 1
        self.history.append({"epoch": self.epoch, "loss": mean_over_processes(accelerator, float(np.mean(losses)))})

    def _step(
        self, examples: np.ndarray, rng: np.random.Generator, generator: torch.Generator, running: RunningSRCC
    ) -> float:
        recipe, rows = self.recipe, self.task.rows(examples)
        seen, context = self._look(rows, generator)
        texts = self.prompts or self.model.read_prompts([self.task.prompts[row] for row in rows])
        index = texts.index[torch.from_numpy(rows)] if self.prompts is not None else texts.index
        wrong = None
        allowed = np.unique(index.cpu().numpy()) if self.wrong is None else self.wrong
        if recipe.mismatch_weight and len(allowed) > 1:
            wrong = other_prompts(index, allowed, rng)
        quality, correspondence, other, penalty = self.scoring(seen, context, texts.tensors, index, wrong)
        loss = self.task.loss((quality, correspondence), examples, recipe) + penalty
        if other is not None and correspondence is not None:
            wanted = recipe.mismatch_margin * correspondence.detach().clamp_min(0)
            loss = loss + recipe.mismatch_weight * (wanted - (correspondence - other)).relu().mean()
        value = finite(loss, recipe, self.epoch + 1)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], recipe.clip_norm)
        self.optimizer.step()
        self.average.update(self.model)
        running.add(quality, examples)
        return value

    def validate(self) -> None:
        """Measure on the validation part, and keep the weights if no epoch was better, or if the last is to be kept."""
        rows = self.task.rows(self.validation)
        with self.average.applied(self.model):
            quality, correspondence = predict(self.model, self.task.prompts, self.source, rows, progress=False)
            value = self.task.measure(quality, correspondence, self.validation, self.recipe.monitor)
            value = agreed(self.accelerator, value)
            self.history[-1]["validation"] = value
            if value > self.best or self.recipe.keep == "last":
                self.best, self.best_epoch = value, self.epoch
                self.best_state = trained_state(self.model, towers=self.recipe.train_towers)
        if self.show:
            loss = self.history[-1]["loss"]
            line = f"epoch {self.epoch}: loss {loss:.4f}, validation {value:.4f}, best {self.best:.4f}"
            tqdm.write(line, file=sys.stderr)

    def save(self) -> None:
        """Write a checkpoint, by the main process alone."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        checkpoints.save_checkpoint(
            self.folder,
            model=trained_state(self.model, towers=self.recipe.train_towers),
            average=self.average.weights,
            best=self.best_state,
            optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
            state={
                "epoch": self.epoch,
                "best_epoch": self.best_epoch,
                "best": self.best,
                "history": self.history,
                "steps": self.average.steps,
                **self.settings,
            },
        )

    def _resume(self) -> None:
        if self.folder is None:
            return
        with self.accelerator.main_process_first():
            if not checkpoints.find_checkpoint(self.folder):
                return
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        weights, average, best, state = checkpoints.load_checkpoint(self.folder, inner, self.settings)
        device = self.accelerator.device
        self.model.load_state_dict({name: t.to(device) for name, t in weights.items()}, strict=False)
        self.best_state = {name: t.to(device) for name, t in best.items()}
        self.epoch, self.best_epoch, self.best = state["epoch"], state["best_epoch"], state["best"]
        self.history, self.average.steps = state["history"], state["steps"]
        self.average.weights = {name: t.to(device) for name, t in average.items()}

    def finish(self) -> FitResult:
        """Put the kept epoch's weights into the model."""
        self.model.load_state_dict(self.best_state, strict=False)
        self.model.requires_grad_(False).eval()
        return FitResult(
            best_epoch=self.best_epoch,
            best=self.best,
            history=tuple(self.history),
            unreadable=self.source.unreadable,
            stopped_early=self.epoch < self.recipe.epochs,
        )

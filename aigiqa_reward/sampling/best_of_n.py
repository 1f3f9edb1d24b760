"""Best of N: sample candidates for a prompt, score them and keep the best; or rank images that exist already."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from torch import nn
from tqdm.auto import tqdm

from aigiqa_reward import images as pixels
from aigiqa_reward.rewards.bound import BoundReward
from aigiqa_reward.rewards.factory import as_reward
from aigiqa_reward.rewards.scorer import Inputs, Scorer, check_images
from aigiqa_reward.sampling.candidates import POOL, BestOfNOutput, Judged, Keep, Picture, Tally, conclude, judge, judged
from aigiqa_reward.sampling.pipeline_utils import PromptMemo, Sampler, check_pipe_kwargs, in_chunks, takes
from aigiqa_reward.sampling.rollout import Rollout
from aigiqa_reward.sampling.search import Halving, Search, ZeroOrder, climb, halve
from aigiqa_reward.types import RewardFunction
from aigiqa_reward.utils.checks import check_prompt, check_text, first_seed, integer

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

__all__ = ["BestOfN", "BestOfNOutput", "rerank"]

_OWNED = {
    "generator": "each candidate has its own, made from its seed: pass seed=",
    "latents": "each candidate draws its own from its seed: pass seed=",
    "num_images_per_prompt": "set n= and batch_size= of BestOfN",
    "output_type": "the winners come as PIL images in the output's .images",
    "return_dict": "the result is a BestOfNOutput",
}
"""Arguments of a pipeline that BestOfN sets itself, and what to do instead."""

_SEVERAL = "loop over them, or use best_of_each(search, prompts, out) of aigiqa_reward.sampling"

Plan = TypeVar("Plan", Halving, ZeroOrder)


class BestOfN:
    """Samples `n` candidates for a prompt, scores them with a reward and keeps the best `top_k`.

    Candidate i has the seed `s = seed + i` and its own generator, so that `pipe(prompt,
    generator=torch.Generator("cpu").manual_seed(s), **pipe_kwargs)` makes its image again: bit for bit with
    batch_size=1 in float32 on the CPU, within 2/255 otherwise. A pipeline that also draws from torch's global random
    state (SD3's ControlNet, FLUX with a stochastic scheduler) needs `torch.manual_seed(s)` before. Candidates are
    sampled one by one where a batch would not keep them apart: most pipelines encode an input image with the first
    candidate's generator, diffusers' caches decide for a whole batch, and some calls lack `num_images_per_prompt`. The
    prompt is encoded once by the pipeline and once by the reward. Images stay on the pipeline's device until they are
    scored; only the winners are kept, so memory does not grow with `n` (except with `keep`, and for latents when
    pruning: below), and the ranking does not depend on `batch_size`. A chunk that runs out of memory is halved and
    sampled again, with the same result. The pipeline is not changed.

    With `pruning`, or `search="zero_order"`, our own loop over the pipeline's parts takes the steps; it supports the
    architectures in `sampling.families`. Pruning takes all candidates some of the way, scores the clean images
    predicted there, and continues with the best; those that reach the end are the images of their seeds, as without
    pruning. If fewer than `top_k` of them can be ranked (the safety checker sees final images only), the best of the
    pruned continue in their place, for further denoiser calls; until then each candidate's latents and the history of a
    multistep sampler stay on the device. Zero-order search changes noises: `.noises` then has those of the
    winners, and `.seeds` has None for those that do not begin with their seed's noise.

    Args:
        pipe: diffusers pipeline that makes images from a prompt, or from images too (image to image, ControlNet,
            inpainting), or anything called like one.
        reward: a Reward, or any `f(images, prompts) -> (B,) tensor or RewardOutput`; it stays on its
            device. A name, such as "pickscore", creates that reward on the pipeline's device.
        n: number of candidates.
        batch_size: candidates sampled at a time.
        top_k: images to keep, in [1, n].
        pruning: None, "halving", or a `Halving` with other rounds.
        reward_prompt: text that the reward scores by; by default the pipeline's prompt.
        progress: whether to show a progress bar over the candidates.
        search: "random" for consecutive seeds; "zero_order", or a `ZeroOrder`, to search near the best noise.
        diverse: whether to keep, of the best 4 x `top_k`, the `top_k` that look least alike, the best among them.
        keep: "best"; or "thumbnails" or "all" for small copies or the images of the other candidates in `.others`.

    Example:
        >>> from aigiqa_reward import BestOfN, create_reward, load_embedded_pipeline
        >>> pipe, reward = load_embedded_pipeline(), create_reward("compact")
        >>> best = BestOfN(pipe, reward, n=4, batch_size=2, top_k=2, progress=False)
        >>> result = best("a red apple on a blue background", seed=7, num_inference_steps=2)
        >>> len(result.images), result.scores == sorted(result.scores, reverse=True), result.all_seeds
        (2, True, [7, 8, 9, 10])
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | Callable[..., Any],
        reward: RewardFunction | str,
        n: int = 16,
        batch_size: int = 4,
        top_k: int = 1,
        pruning: Literal["halving"] | Halving | None = None,
        reward_prompt: str | None = None,
        progress: bool = True,
        search: Literal["random", "zero_order"] | ZeroOrder = "random",
        diverse: bool = False,
        keep: Keep = "best",
    ) -> None:
        self.reward: RewardFunction = as_reward(reward, pipe)
        if not callable(pipe) or isinstance(pipe, nn.Module):
            load = "load one, with DiffusionPipeline.from_pretrained or load_embedded_pipeline"
            raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}; {load}")
        self.pipe: Any = pipe
        self.n = integer("n", n, least=1)
        self.batch_size = integer("batch_size", batch_size, least=1)
        self.top_k = integer("top_k", top_k, least=1)
        if self.top_k > self.n:
            raise ValueError(f"top_k: expected at most n={self.n}, got {self.top_k}; raise n, or ask for fewer")
        self.pruning = _plan("pruning", pruning, {None: None, "halving": Halving()}, Halving)
        self.search = _plan("search", search, {"random": None, "zero_order": ZeroOrder()}, ZeroOrder)
        if self.pruning and self.search:
            raise ValueError("pruning, search: pass one of them; zero-order search needs every candidate's final score")
        self.diverse = bool(diverse)
        if keep not in get_args(Keep):
            raise ValueError(f"keep: expected one of {', '.join(get_args(Keep))}, got {keep!r}")
        self.keep: Keep = keep
        if reward_prompt is not None:
            check_text(reward_prompt, "reward_prompt", "leave it out to use the pipeline's prompt")
        self.reward_prompt = reward_prompt
        self.progress = progress
        self._batched = takes(pipe, "num_images_per_prompt")

    def __call__(self, prompt: str | None = None, seed: int = 0, **pipe_kwargs: Any) -> BestOfNOutput:
        """Sample, score and rank the candidates for one prompt; warn once of candidates that were dropped.

        Candidates are dropped if their pixels or scores are NaN or infinite, or if the safety checker flagged them. If
        fewer than `top_k` are left, so many are returned.

        Args:
            prompt: one prompt; or None together with `prompt_embeds` of shape (1, ...) and a `reward_prompt`, but not
                with pruning or search, which encode the prompt themselves.
            seed: seed of the first candidate.
            **pipe_kwargs: arguments of the pipeline's call (steps, guidance, size, negative prompt, ...), except for
                `generator`, `latents`, `num_images_per_prompt`, `output_type` and `return_dict`.

        Raises:
            NothingRankedError: every candidate was dropped.
            torch.OutOfMemoryError: not even one candidate fits into memory.
        """
        output: Any = None  # n is at least 1
        with tqdm(total=self.n, desc="best of n", disable=not self.progress) as bar:
            for output in self._start(prompt, seed, pipe_kwargs, stacklevel=4):
                if output.denoiser_calls:
                    bar.set_postfix(calls=output.denoiser_calls)
                bar.update(len(output.all_seeds) - bar.n)
        return output

    def stream(
        self, prompt: str | None = None, seed: int = 0, **pipe_kwargs: Any
    ) -> Generator[BestOfNOutput, None, None]:
        """Yield the output so far after each chunk of candidates; arguments and errors are those of a call.

        Between two outputs the pipeline is as it was, and the loop may be left. Until a first candidate is ranked,
        `.images` is empty. Arguments are checked at once; warning and NothingRankedError come after the last output.
        """
        return self._start(prompt, seed, pipe_kwargs, stacklevel=3)

    def _start(
        self, prompt: str | None, seed: int, pipe_kwargs: dict[str, Any], *, stacklevel: int
    ) -> Generator[BestOfNOutput, None, None]:
        first = first_seed(seed, self.n, f"all n={self.n} candidates")
        check_prompt(prompt, several=_SEVERAL)
        check_pipe_kwargs(pipe_kwargs, "BestOfN", _OWNED)
        text = self.reward_prompt
        if text is None:
            text = check_text(prompt, "prompt", "pass the reward's prompt as BestOfN(..., reward_prompt=)")
        reward, tally = BoundReward(self.reward, [text]), Tally(self.top_k, diverse=self.diverse, keep=self.keep)
        memo, sampler, seeds = PromptMemo(self.pipe), Sampler(self.pipe, pipe_kwargs), range(first, first + self.n)

        def sample_and_score(chunk: Sequence[int]) -> None:
            with memo.installed():
                images, flagged = sampler(prompt, chunk)
            tally.add(chunk, judge(images, flagged, reward, text), lambda row: Picture.of(images, row))

        if self.pruning or self.search:
            run = self._own_loop(prompt, seeds, reward, text, tally, pipe_kwargs)
        else:
            size = self.batch_size if self._batched and sampler.together else 1
            run = in_chunks(seeds, size, sample_and_score, self.pipe)
        return self._outputs(tally, run, stacklevel)

    def _outputs(self, tally: Tally, run: Iterator[Any], stacklevel: int) -> Generator[BestOfNOutput, None, None]:
        for _ in run:
            yield tally.output()
        if hasattr(self.pipe, "maybe_free_model_hooks"):
            self.pipe.maybe_free_model_hooks()  # what the pipeline's own loop does at its end
        conclude(tally.output(), self.top_k, name="seed", stacklevel=stacklevel)

    def _own_loop(
        self, prompt: str | None, seeds: range, reward: BoundReward, text: str, tally: Tally, kwargs: dict[str, Any]
    ) -> Iterator[Any]:
        need = "BestOfN(pruning=...)" if self.pruning else "BestOfN(search=...)"
        if prompt is None:
            raise ValueError(f"prompt: {need} encodes the prompt itself: expected a text, got None")
        search = Search(Rollout(self.pipe, need=need, **kwargs), prompt, reward, text, self.batch_size, tally)
        if self.pruning is None:
            return climb(search, seeds, self.search or ZeroOrder())
        return halve(search, seeds, self.pruning, least=self.top_k * POOL if self.diverse else self.top_k)


def _plan(argument: str, given: object, named: dict[str | None, Plan | None], kind: type[Plan]) -> Plan | None:
    """Return the plan with this name, or the plan itself."""
    if isinstance(given, kind):
        return given
    if (given is None or isinstance(given, str)) and given in named:
        return named[given]
    names = ", ".join(repr(name) for name in named)
    raise ValueError(f"{argument}: expected {names} or a {kind.__name__}, got {given!r}")


_BATCH = 8  # images read and scored at once by `rerank`, so that a thousand files need the memory of eight


def rerank(
    images: Inputs,
    prompt: str | None,
    reward: RewardFunction | str,
    top_k: int | None = None,
) -> BestOfNOutput:
    """Rank existing images of one prompt; warn once of images that were dropped.

    Images are dropped if they cannot be read, or if their pixels or scores are NaN or infinite.

    Args:
        images: PIL images, paths, arrays and tensors of mixed sizes (see `images.load`), or a batch (B, 3, H, W) in
            [0, 1]. They are read in order, a few at a time.
        prompt: text that they should show; None ranks by quality alone, if the reward can.
        reward: a Reward, its name, or any `f(images, prompts) -> (B,) tensor or RewardOutput`.
        top_k: images to return, in [1, number of images]; by default all.

    Returns:
        Best first, ties to the earlier. `.seeds` are the indices of the inputs; `.images` are the images as they were
        scored: RGB, upright, transparency on white. A NothingRankedError is raised if every image was dropped.

    Example:
        >>> from PIL import Image
        >>> from aigiqa_reward import create_reward, rerank
        >>> pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
        >>> result = rerank(pictures, "a red square", create_reward("compact"), top_k=1)
        >>> len(result.images), result.seeds[0] in range(3), len(result.all_scores)
        (1, True, 3)
    """
    sources = check_images(images, "images")
    if check_prompt(prompt) is not None:
        check_text(prompt, "prompt", "pass the text that the images should show, or None to rank by quality alone")
    wanted = top_k or 0  # images that are missed where fewer are left
    top_k = len(sources) if top_k is None else integer("top_k", top_k, least=1)
    if top_k > len(sources):
        raise ValueError(f"top_k: expected at most {len(sources)}, the number of images, got {top_k}; ask for fewer")
    tally = Tally(top_k)
    for result in Scorer(reward, batch_size=_BATCH).stream(sources, prompt):
        found = [Judged(dropped=result.error)] if result.output is None else judged(result.output)
        source = sources[result.index]
        tally.add([result.index], found, lambda _, source=source: Picture.of(pixels.load(source)[None], 0))
    output = tally.output()
    conclude(output, wanted, name="image", stacklevel=3)
    return output

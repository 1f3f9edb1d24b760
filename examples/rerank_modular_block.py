"""A block for Modular Diffusers that ranks the images of a pipeline by a reward.

Insert it after the block that decodes; its inputs are the images and the prompt.

    blocks = ModularPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0").blocks
    blocks.sub_blocks.insert("rerank", RerankBlock(), len(blocks.sub_blocks))
    pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components(torch_dtype=torch.bfloat16)
    pipe.update_components(reward=create_reward("compact"))
    state = pipe(prompt="a red fox in the snow", num_images_per_prompt=8, top_k=2)
    state.get("images"), state.get("scores"), state.get("ranking")
"""

from __future__ import annotations

from typing import Any

from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from aigiqa_reward import Reward, create_reward, rerank


class RerankBlock(ModularPipelineBlocks):
    """Images, best first, with their scores. The reward is a component: `pipe.update_components(reward=...)`."""

    @property
    def description(self) -> str:
        return "Ranks images by perceptual quality and correspondence to the prompt, and keeps the best top_k."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("reward", Reward)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("images", required=True, description="PIL images, or a tensor (B, 3, H, W) in [0, 1]"),
            InputParam("prompt", required=True, type_hint=str, description="the prompt of all images"),
            InputParam("top_k", type_hint=int, description="number of images to keep, by default all"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("images", type_hint=list, description="PIL images, best first"),
            OutputParam("scores", type_hint=list, description="total scores, best first"),
            OutputParam("ranking", type_hint=list, description="indices among the given images, best first"),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state: Any = self.get_block_state(state)
        prompt = block_state.prompt
        if isinstance(prompt, list):
            if len(prompt) != 1:
                raise ValueError(f"prompt: expected one for all images, got {len(prompt)}; call the pipeline for each")
            prompt = prompt[0]
        reward = components.reward or create_reward("compact")
        ranked = rerank(block_state.images, prompt, reward, top_k=block_state.top_k)
        block_state.images, block_state.scores, block_state.ranking = ranked.images, ranked.scores, ranked.seeds
        self.set_block_state(state, block_state)
        return components, state


def main(images: Any, prompt: str, *, top_k: int | None = None, reward: Reward | None = None) -> Any:
    """Run the block alone."""
    pipe = RerankBlock().init_pipeline()
    pipe.update_components(reward=reward or create_reward("compact"))
    return pipe(images=images, prompt=prompt, top_k=top_k)

"""The rewards by name: a literal table of what a user should know before choosing one."""

from __future__ import annotations

import difflib

from aigiqa_reward.models.base import ModelSpec

TOWER_FILES: dict[str, str] = {
    "towers/image.safetensors": "fbf5ed7dabfe5b52242e45255c11d8fb4ecff851e79b193668c122a319029d80",
    "towers/text.safetensors": "5c8ccd909081d4b56784254744148ef34833a92748690d06f78814d1ee5fe46b",
    "towers/alignment.safetensors": "1f31a58cd30d7edacdf3a8d8471a22e9e5da2547b44caaa57b7b3d20f5c641c0",
}
"""The embedded towers that all systems share, and the SHA-256 of each file."""

SPECS: dict[str, ModelSpec] = {
    "compact": ModelSpec(
        name="compact",
        title="Compact (likeness to scored images, on two small towers)",
        paper="none: ours; coarse and fine views after MST-CLIPIQA",
        license="Apache-2.0 (code and heads; towers Apache-2.0 and MIT; scores AGIQA-3K, MIT)",
        scale="[0, 1] on AGIQA-3K, 1 = its best human score; not clamped",
        input_size="whole image at 256 x 256 px area, 4 to 16 crops of 224 px at native resolution up to 512 px",
        differentiable=True,
        gradient_path="pixels through both image towers, the statistics and the heads; prompts fixed",
        needs_prompt=False,
        weights="embedded",
        megabytes=40.0,
        sha256={
            "towers/image.safetensors": "fbf5ed7dabfe5b52242e45255c11d8fb4ecff851e79b193668c122a319029d80",
            "compact/model.safetensors": "f89fe8de6b4e72d3ed2eb1ac8cfa458251a27ec1990c04c6013067af28caf5a0",
            "towers/text.safetensors": "5c8ccd909081d4b56784254744148ef34833a92748690d06f78814d1ee5fe46b",
        },
    ),
    "mst_clipiqa": ModelSpec(
        name="mst_clipiqa",
        title="MST-CLIPIQA",
        paper="Meng, MST-CLIPIQA: multi-scale two-stream CLIP for AI-generated image quality assessment (arXiv)",
        license="Apache-2.0 (code and head; towers Apache-2.0 and MIT; scores AGIQA-3K, MIT)",
        scale="[0, 1] on AGIQA-3K, 1 = its best human score; not clamped",
        input_size="whole image at 256 x 256 and at 512 x 512 px area",
        differentiable=True,
        gradient_path="pixels through both streams, the gate and the heads; prompts fixed",
        needs_prompt=False,
        weights="embedded; trained on AGIQA-3K on the compact towers",
        megabytes=30.8,
        sha256=TOWER_FILES
        | {"mst_clipiqa/model.safetensors": "f64da9cca7d1a841a901599e91d7158a97dc76fa34db85c9b5e1ba2b5704c74f"},
    ),
    "tsp_mgs": ModelSpec(
        name="tsp_mgs",
        title="TSP-MGS",
        paper="Xia et al., AI-Generated Image Quality Assessment Based on Task-Specific Prompt and Multi-Granularity "
        "Similarity",
        license="Apache-2.0 (code and head; towers Apache-2.0 and MIT; scores AGIQA-3K, MIT)",
        scale="[0, 1] on AGIQA-3K, 1 = its best human score; not clamped",
        input_size="whole image at 224 x 224 px area, 9 crops of 224 px at 512 px short side",
        differentiable=True,
        gradient_path="pixels through the image tower and the similarities; prompts fixed",
        needs_prompt=False,
        weights="embedded; trained on AGIQA-3K on the compact towers",
        megabytes=29.2,
        sha256=TOWER_FILES
        | {"tsp_mgs/model.safetensors": "5eebedde8f6a48a7da18f95847e53ba72731c7a1c10101b97986e3715ce91b3b"},
    ),
    "sc_agiqa": ModelSpec(
        name="sc_agiqa",
        title="SC-AGIQA",
        paper="SC-AGIQA: semantic consistency and frequency-domain degradation perception for AI-generated images",
        license="Apache-2.0 (code and head; towers Apache-2.0 and MIT; scores AGIQA-3K, MIT)",
        scale="[0, 1] on AGIQA-3K, 1 = its best human score; not clamped",
        input_size="9 crops of 224 px at 512 px short side, whole image letterboxed to 224 px",
        differentiable=True,
        gradient_path="pixels through the towers, the spectrum and the experts; descriptions fixed",
        needs_prompt=False,
        weights="embedded; trained on AGIQA-3K on the compact towers",
        megabytes=30.1,
        sha256=TOWER_FILES
        | {"sc_agiqa/model.safetensors": "93c3fea9888d2e1de1ae99477f03f86f871e4cd139bfbddf5263fe2d10490d2b"},
    ),
    "ma_agiqa": ModelSpec(
        name="ma_agiqa",
        title="MA-AGIQA",
        paper="MA-AGIQA: large multi-modality model assisted AI-generated image quality assessment",
        license="Apache-2.0 (code and head; towers Apache-2.0 and MIT; scores AGIQA-3K, MIT)",
        scale="[0, 1] on AGIQA-3K, 1 = its best human score; not clamped",
        input_size="9 crops of 224 px at 512 px short side, whole image at 256 x 256 px area",
        differentiable=True,
        gradient_path="pixels through the image tower and MANIQA's head; the multimodal model's features, or what "
        "stands for them, fixed",
        needs_prompt=False,
        weights="embedded; trained on AGIQA-3K on the compact towers",
        megabytes=30.1,
        sha256=TOWER_FILES
        | {"ma_agiqa/model.safetensors": "569c5e62a80456d868c2ac52d2a9f3d4583dd8ab188a9067e799a1493a43c927"},
    ),
    "cpa_iqa": ModelSpec(
        name="cpa_iqa",
        title="CPA-IQA",
        paper="CPA-IQA: contextual preference-aligned framework for AIGC quality assessment",
        license="Apache-2.0 (code and head; towers Apache-2.0 and MIT; scores AGIQA-3K, MIT)",
        scale="[0, 1], fitted to AGIQA-3K, 1 = its best human score; details['score'] runs from 0 to 100",
        input_size="whole image letterboxed to 448 px",
        differentiable=True,
        gradient_path="pixels through the image tower, the tiers and the distortion maps; regions and attributes fixed",
        needs_prompt=False,
        weights="embedded; trained on AGIQA-3K on the compact towers",
        megabytes=29.1,
        sha256=TOWER_FILES
        | {"cpa_iqa/model.safetensors": "aa85a91071d581f4c354e94da27cabf1d93f42a150f3d08c72a5e745d37cdc9b"},
    ),
}
"""What there is to know of each reward before choosing it, by name."""


def list_rewards() -> list[ModelSpec]:
    """Every reward of the zoo, with its paper, license, scale, sizes and gradient path.

    Example:
        >>> from aigiqa_reward import list_rewards
        >>> [spec.name for spec in list_rewards()]
        ['compact', 'mst_clipiqa', 'tsp_mgs', 'sc_agiqa', 'ma_agiqa', 'cpa_iqa']
    """
    return list(SPECS.values())


def get_spec(name: str) -> ModelSpec:
    """The entry of one reward.

    Raises:
        ValueError: no such reward; names the ones that exist and the one probably meant.

    Example:
        >>> get_spec("tsp_mgs").title, get_spec("tsp_mgs") is SPECS["tsp_mgs"]
        ('TSP-MGS', True)
    """
    if isinstance(name, str) and name in SPECS:
        return SPECS[name]
    close = difflib.get_close_matches(str(name).lower().replace("-", "_"), SPECS, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"name: no reward is called {name!r}{meant} The rewards are: {', '.join(SPECS)}")

"""The table of rewards: what a user should know before choosing one."""

from __future__ import annotations

from typing import Any

from aigiqa_reward.models.base import ModelSpec

TOWER_FILES: dict[str, str] = {
    "towers/image.safetensors": "fbf5ed7dabfe5b52242e45255c11d8fb4ecff851e79b193668c122a319029d80",
    "towers/text.safetensors": "5c8ccd909081d4b56784254744148ef34833a92748690d06f78814d1ee5fe46b",
    "towers/alignment.safetensors": "1f31a58cd30d7edacdf3a8d8471a22e9e5da2547b44caaa57b7b3d20f5c641c0",
}
"""The embedded towers that all five systems share, with the SHA-256 of each file."""

_SCALE = "1 is the best human score of AGIQA-3K; not clamped: may be below 0 or above 1; compares images of one prompt"


def _system(name: str, *, sha256: str, scale: str = _SCALE, **facts: Any) -> ModelSpec:
    """A published system with a head trained on AGIQA-3K on the compact towers."""
    return ModelSpec(
        name=name,
        license="Apache-2.0 (code and head; towers Apache-2.0 and MIT; scores AGIQA-3K, MIT)",
        scale=scale,
        differentiable=True,
        needs_prompt=False,
        weights="embedded; trained on AGIQA-3K on the compact towers",
        sha256=TOWER_FILES | {f"{name}/model.safetensors": sha256},
        **facts,
    )


def _published(name: str, *, needs_prompt: bool = True, **facts: Any) -> ModelSpec:
    """A published reward, whose weights are fetched from the Hub."""
    facts = {"judges": "preference", "weights": "fetched from the Hub, checked by hash", **facts}
    return ModelSpec(name=name, differentiable=True, needs_prompt=needs_prompt, **facts)


SPECS: dict[str, ModelSpec] = {
    "compact": ModelSpec(
        name="compact",
        title="Compact (a tower for quality, two for the match)",
        paper="none: ours; coarse and fine views after MST-CLIPIQA",
        license="Apache-2.0 (code; pretrained towers Apache-2.0 and MIT); trained on AGIQA-3K (MIT), VISOR (MIT), "
        "BIQ2021 (no license file; described as freely available) and Flickr8k (photographs of Flickr users, "
        "distributed for non-commercial research and education)",
        scale="both scores in (0, 1): 1 is the best human score of AGIQA-3K",
        input_size="whole image at 384 x 384 px area and at 256 x 256 px, and at native resolution: whole up to "
        "512 px, up to 4 crops of larger ones",
        differentiable=True,
        gradient_path="pixels through both image towers and the heads; prompts fixed",
        needs_prompt=False,
        weights="embedded",
        megabytes=41.9,
        sha256={
            "towers/text.safetensors": TOWER_FILES["towers/text.safetensors"],
            "compact/model.safetensors": "84fb162ffaf235855b6e66594178db9910427f37a107382f39e4aa8f139ada18",
        },
        no_match=0.2,
    ),
    "mst_clipiqa": _system(
        "mst_clipiqa",
        title="MST-CLIPIQA",
        paper="Meng, MST-CLIPIQA: multi-scale two-stream CLIP for AI-generated image quality assessment (arXiv)",
        input_size="whole image at 256 x 256 and at 512 x 512 px area",
        gradient_path="pixels through both streams, the gate and the heads; prompts fixed",
        megabytes=30.8,
        sha256="f64da9cca7d1a841a901599e91d7158a97dc76fa34db85c9b5e1ba2b5704c74f",
    ),
    "tsp_mgs": _system(
        "tsp_mgs",
        title="TSP-MGS",
        paper="Xia et al., AI-Generated Image Quality Assessment Based on Task-Specific Prompt and Multi-Granularity "
        "Similarity",
        input_size="whole image at 224 x 224 px area, 9 crops of 224 px at 512 px short side",
        gradient_path="pixels through the image tower and the similarities; prompts fixed",
        megabytes=29.2,
        sha256="5eebedde8f6a48a7da18f95847e53ba72731c7a1c10101b97986e3715ce91b3b",
    ),
    "sc_agiqa": _system(
        "sc_agiqa",
        title="SC-AGIQA",
        paper="SC-AGIQA: semantic consistency and frequency-domain degradation perception for AI-generated images",
        input_size="9 crops of 224 px at 512 px short side, whole image letterboxed to 224 px",
        gradient_path="pixels through the towers, the spectrum and the experts; descriptions fixed",
        megabytes=30.1,
        sha256="93c3fea9888d2e1de1ae99477f03f86f871e4cd139bfbddf5263fe2d10490d2b",
    ),
    "ma_agiqa": _system(
        "ma_agiqa",
        title="MA-AGIQA",
        paper="MA-AGIQA: large multi-modality model assisted AI-generated image quality assessment",
        input_size="9 crops of 224 px at 512 px short side, whole image at 256 x 256 px area",
        gradient_path="pixels through the image tower and MANIQA's head; the multimodal model's features, or their "
        "substitute, fixed",
        megabytes=30.1,
        sha256="569c5e62a80456d868c2ac52d2a9f3d4583dd8ab188a9067e799a1493a43c927",
    ),
    "cpa_iqa": _system(
        "cpa_iqa",
        title="CPA-IQA",
        paper="CPA-IQA: contextual preference-aligned framework for AIGC quality assessment",
        scale=f"{_SCALE}; details['score'] runs from 0 to 100",
        input_size="whole image letterboxed to 448 px",
        gradient_path="pixels through the image tower, the tiers and the distortion maps; regions and attributes fixed",
        megabytes=29.1,
        sha256="aa85a91071d581f4c354e94da27cabf1d93f42a150f3d08c72a5e745d37cdc9b",
    ),
    "pickscore": _published(
        "pickscore",
        title="PickScore v1",
        paper="Kirstain et al. 2023, Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation",
        license="MIT (code); the weights' page names none",
        scale="raw = exp(logit_scale) cos, about 15 to 26; total = raw / 26; compares images of one prompt",
        input_size="center crop of 224 px",
        gradient_path="pixels through the image tower; prompts fixed",
        megabytes=3940.0,
        accuracy="Pick-a-Pic test 70.5 %",
    ),
    "hpsv2.1": _published(
        "hpsv2.1",
        title="HPS v2.1",
        paper="Wu et al. 2023, Human Preference Score v2",
        license="Apache-2.0 (code and weights)",
        scale="raw = total = cos, about .14 to .33; compares images of one prompt",
        input_size="whole image letterboxed to 224 px on black",
        gradient_path="pixels through the image tower; prompts fixed",
        megabytes=1972.0,
        accuracy="HPDv2 test 84.1 %",
    ),
    "hpsv2": _published(
        "hpsv2",
        title="HPS v2.0",
        paper="Wu et al. 2023, Human Preference Score v2",
        license="Apache-2.0 (code and weights)",
        scale="raw = total = cos, around .27; compares images of one prompt",
        input_size="whole image letterboxed to 224 px on black",
        gradient_path="pixels through the image tower; prompts fixed",
        megabytes=1972.0,
        accuracy="HPDv2 test 83.3 %",
    ),
    "mps": _published(
        "mps",
        title="MPS (overall)",
        paper="Zhang et al. 2024, Learning Multi-dimensional Human Preference for Text-to-Image Generation",
        license="MIT (code); the weights' page names none",
        scale="raw = exp(logit_scale) cos; total = raw / 26; compares images of one prompt",
        input_size="center crop of 224 px",
        gradient_path="pixels through the image tower and the cross-attention; prompts and their mask fixed",
        weights="fetched from the Hub",
        megabytes=4420.0,
        accuracy="HPDv2 test 83.5 %, ImageReward test 67.5 %",
    ),
    "imagereward": _published(
        "imagereward",
        title="ImageReward v1.0",
        paper="Xu et al. 2023, ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
        license="Apache-2.0 (code and weights)",
        scale="raw standardized, mostly -2 to 2; total = (raw + 2) / 4",
        input_size="center crop of 224 px",
        gradient_path="pixels through the image tower and the text encoder's cross-attention; prompts fixed",
        megabytes=1790.0,
        accuracy="ImageReward test 65.1 %",
    ),
    "cyclereward": _published(
        "cyclereward",
        title="CycleReward (Combo)",
        paper="Bahng et al. 2025, Cycle Consistency as Reward: Learning Image-Text Alignment without Human Preferences",
        license="MIT (code); the weights' page names none",
        scale="raw = total, not scaled",
        input_size="center crop of 224 px",
        gradient_path="pixels through the image tower and the text encoder's cross-attention; prompts fixed",
        weights="fetched from the Hub",
        megabytes=1800.0,
    ),
    "clipscore": _published(
        "clipscore",
        title="CLIPScore (OpenAI's ViT-L/14, or any other CLIP)",
        paper="Hessel et al. 2021, CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
        license="MIT (code and weights)",
        scale="raw = cos, about .15 to .40; total = 2.5 raw, not clamped",
        input_size="center crop of 224 px",
        gradient_path="pixels through the image tower; prompts fixed",
        megabytes=1710.0,
        judges="correspondence",
    ),
    "siglip2": _published(
        "siglip2",
        title="SigLIP 2 (SO400M/14, 384 px, or any other of one size)",
        paper="Tschannen et al. 2025, SigLIP 2: Multilingual Vision-Language Encoders",
        license="Apache-2.0 (code and weights)",
        scale="raw = total = the logit, whose sigmoid is the probability of a match; usually negative",
        input_size="whole image squashed to 384 x 384 px",
        gradient_path="pixels through the image tower; prompts fixed",
        weights="fetched from the Hub",
        megabytes=4540.0,
        judges="correspondence",
    ),
    "laion_aesthetic": _published(
        "laion_aesthetic",
        title="LAION aesthetic v2 (sac+logos+ava1)",
        paper="Schuhmann 2022, improved-aesthetic-predictor",
        license="Apache-2.0 (head, embedded), MIT (CLIP ViT-L/14)",
        scale="raw about 1 to 10; total = (raw - 1) / 9",
        input_size="center crop of 224 px",
        gradient_path="pixels through the image tower and the head",
        needs_prompt=False,
        megabytes=1710.0,
        judges="quality",
    ),
    "vqascore": _published(
        "vqascore",
        title="VQAScore (Qwen2.5-VL 3B, or any other Qwen2.5-VL or Qwen3-VL)",
        paper="Lin et al. 2024, Evaluating Text-to-Visual Generation with Image-to-Text Generation",
        license="Apache-2.0 (code; weights of most sizes), Qwen Research License (weights of the 3B)",
        scale='raw = total = P("Yes") in [0, 1] over the whole vocabulary; details["log_odds"] is log P(Yes) / P(No)',
        input_size="whole image, each side to the nearest multiple of 28 px (Qwen3-VL: 32 px)",
        gradient_path="pixels through the image tower and the language model; prompts fixed",
        weights="fetched from the Hub",
        megabytes=7510.0,
        judges="correspondence",
    ),
    "hpsv3": _published(
        "hpsv3",
        title="HPSv3",
        paper="Ma et al. 2025, HPSv3: Towards Wide-Spectrum Human Preference Score",
        license="MIT (code and weights; Qwen2-VL, Apache-2.0)",
        scale="raw unbounded, mostly -0.2 to 11; total = raw / 15; compares images of one prompt",
        input_size="whole image at 448 x 448 px of area",
        gradient_path="pixels through the image tower and the language model; prompts fixed",
        weights="fetched from the Hub",
        megabytes=16600.0,
        accuracy="ImageReward test 66.8 %, Pick-a-Pic test 72.8 %, HPDv2 test 85.4 %, HPDv3 test 76.9 %",
    ),
    "ocr": ModelSpec(
        name="ocr",
        title="OCR (text in quotes, read by RapidOCR)",
        paper="Liu et al. 2025, Flow-GRPO: Training Flow Matching Models via Online RL (its reward for text, nearly)",
        license="Apache-2.0 (code, RapidOCR and PP-OCR weights)",
        scale="raw = total = 1 - (edit distance) / (length of the longer text), in [0, 1]; whitespace and case ignored",
        input_size="whole image, in 8 bits",
        differentiable=False,
        gradient_path="none; for best of N, steering, DDPO, FlowGRPO, DiffusionNFT and DPO",
        needs_prompt=True,
        weights="in the package rapidocr (extra ocr)",
        megabytes=31.7,
        judges="correspondence",
    ),
}
"""The rewards by name."""

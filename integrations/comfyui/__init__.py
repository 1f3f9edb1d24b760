"""ComfyUI nodes that score, rank and filter images by aigiqa-reward. Imports without ComfyUI."""

try:
    import aigiqa_reward  # noqa: F401
except ImportError as error:
    raise ImportError(
        "The AIGIQA Reward nodes need the package aigiqa-reward in the Python that runs ComfyUI: "
        "install it there from a checkout of its repository with `python -m pip install ./aigiqa-reward`, as this "
        "pack's README.md says; it is not on PyPI yet"
    ) from error

from .choose import ContactSheet, Filter, SelectBest
from .loader import RewardLoader
from .score import Score

NODE_CLASS_MAPPINGS = {
    "AIGIQARewardLoader": RewardLoader,
    "AIGIQAScore": Score,
    "AIGIQASelectBest": SelectBest,
    "AIGIQAFilter": Filter,
    "AIGIQAContactSheet": ContactSheet,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AIGIQARewardLoader": "Load Reward (AIGIQA)",
    "AIGIQAScore": "Score Images (AIGIQA)",
    "AIGIQASelectBest": "Select Best Images (AIGIQA)",
    "AIGIQAFilter": "Filter Images by Score (AIGIQA)",
    "AIGIQAContactSheet": "Contact Sheet (AIGIQA)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

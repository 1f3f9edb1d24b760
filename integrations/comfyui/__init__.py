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

_NODES = {
    "AIGIQARewardLoader": (RewardLoader, "Load Reward (AIGIQA)"),
    "AIGIQAScore": (Score, "Score Images (AIGIQA)"),
    "AIGIQASelectBest": (SelectBest, "Select Best Images (AIGIQA)"),
    "AIGIQAFilter": (Filter, "Filter Images by Score (AIGIQA)"),
    "AIGIQAContactSheet": (ContactSheet, "Contact Sheet (AIGIQA)"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: shown for name, (_, shown) in _NODES.items()}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

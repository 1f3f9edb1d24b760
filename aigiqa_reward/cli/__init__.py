"""The command line; `aigiqa_reward.cli:app` is its entry point."""

from aigiqa_reward.cli.main import app

__all__ = ["app"]

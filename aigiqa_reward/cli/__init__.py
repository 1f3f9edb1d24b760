"""The command line: `app` holds the commands; inputs, options, runs, files and output are what they are made of."""

from aigiqa_reward.cli.app import app

__all__ = ["app"]

"""The command line: `app` and `demo` hold the commands; inputs, options, runs, files and output are what they share."""

from aigiqa_reward.cli.app import app

__all__ = ["app"]

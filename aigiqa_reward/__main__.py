"""`python -m aigiqa_reward` is `aigiqa-reward`."""

from aigiqa_reward.cli import app

app(prog_name="aigiqa-reward")

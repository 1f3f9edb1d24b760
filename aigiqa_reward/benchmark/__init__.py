"""Train the systems of the zoo on human scores, and measure what they reach on splits that they have not seen."""

from aigiqa_reward.benchmark.protocol import ABLATIONS, ProtocolSettings, run_protocol
from aigiqa_reward.benchmark.training import Trained, TrainingPlan, train_reward, whole_split

__all__ = ["ABLATIONS", "ProtocolSettings", "Trained", "TrainingPlan", "run_protocol", "train_reward", "whole_split"]

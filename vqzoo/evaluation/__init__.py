"""The evaluation that people can cite: named protocols, metrics, and the card that says how each number was made."""

from vqzoo.evaluation.config import METRICS, EvaluateConfig, FeaturesConfig, better, check
from vqzoo.evaluation.protocols import CROPS, PROTOCOLS, Protocol

__all__ = ["CROPS", "METRICS", "PROTOCOLS", "EvaluateConfig", "FeaturesConfig", "Protocol", "better", "check"]

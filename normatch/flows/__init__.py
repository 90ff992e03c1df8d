"""Normalizing flows: the head that classifies features, and the flows of images and tables."""

from .density import FlowClassifier, FlowDensity, FlowOutput, GaussianMixture
from .head import Coupling, FlowHead
from .realnvp import RealNVPTabular

__all__ = [
    "Coupling",
    "FlowClassifier",
    "FlowDensity",
    "FlowHead",
    "FlowOutput",
    "GaussianMixture",
    "RealNVPTabular",
]

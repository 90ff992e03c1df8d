"""Normalizing flows: the head that classifies features, and flows of images and tables. Imports only ops."""

from .density import FlowClassifier, FlowDensity, FlowOutput, GaussianMixture
from .flow import Flow, initialize
from .glow import Glow, GlowMNIST
from .head import Coupling, FlowHead
from .layers import dequantize
from .realnvp import RealNVP, RealNVPMNIST, RealNVPTabular
from .scnf import SCNF, ConditionalFlow, MaskedGlow, PointFlow

__all__ = [
    "SCNF", "ConditionalFlow", "Coupling", "Flow", "FlowClassifier", "FlowDensity", "FlowHead", "FlowOutput",
    "GaussianMixture", "Glow", "GlowMNIST", "MaskedGlow", "PointFlow", "RealNVP", "RealNVPMNIST", "RealNVPTabular",
    "dequantize", "initialize",
]  # fmt: skip

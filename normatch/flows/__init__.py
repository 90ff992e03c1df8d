"""Normalizing flows: the head that classifies features, and the flows of images and tables."""

from .head import Coupling, FlowHead, FlowOutput

__all__ = ["Coupling", "FlowHead", "FlowOutput"]

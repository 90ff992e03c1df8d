"""normatch: image classifiers from a handful of labels, on fused normalizing-flow kernels."""

__version__ = "0.1.0"

"""normatch: image classifiers from a handful of labels, on fused normalizing-flow kernels."""

import importlib

__version__ = "0.2.0"

# Public name -> the module that holds it, imported on first use: `normatch --help` need not wait for torch.
_PUBLIC = {
    "FlowHead": "flows",
    "FlowOutput": "flows",
    "FlowClassifier": "flows",
    "GaussianMixture": "flows",
    "WideResNet": "methods.backbones",
    "Method": "methods.base",
    "Config": "config",
    "make_config": "config",
    "UserError": "errors",
    "train": "training.trainer",
    "evaluate": "model",
    "load": "model",
    "FlowGMMClassifier": "training.estimator",
}
_MODULES = ("ops", "reference", "augment", "data", "flows", "methods", "training", "model", "config")

__all__ = ["__version__", *_PUBLIC, "ops", "reference"]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'normatch' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PUBLIC, *_MODULES})

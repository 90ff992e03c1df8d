"""Views by NVIDIA DALI (optional)."""

import importlib.util


def missing() -> str | None:
    """Why DALI cannot be used, or None where it can."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "NVIDIA DALI is not installed (pip install nvidia-dali-cuda130)"
    return None

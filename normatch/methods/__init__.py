"""The methods: each is a module with the loss of one paper, `METHODS[name](features, classes, config)`.

`method(features, logits, y, u_y, step) -> loss, metrics` is a function of tensors. What a method learns or remembers
beyond the classifier (flows, alignment window) are its own parameters and buffers.
"""

from .fixmatch import FixMatch
from .normatch import NorMatch
from .supervised import Supervised

METHODS = {"normatch": NorMatch, "fixmatch": FixMatch, "supervised": Supervised}

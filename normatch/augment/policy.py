"""Augmentation policies: what a view may undergo, as data."""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from normatch.errors import UserError, nearest

# The position in this tuple is the operation's number in the parameter table: never reorder.
OPS = (
    "AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Identity", "Posterize", "Rotate", "Sharpness",
    "ShearX", "ShearY", "Solarize", "TranslateX", "TranslateY",
)  # fmt: skip
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


_BLENDS = {op: (0.05, 0.95) for op in ("Brightness", "Color", "Contrast", "Sharpness")}


def _ranges(sign: int, solarize: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """The published ranges; angles, shears and translations begin at `sign` times their end."""
    moves = {op: (sign * 0.3, 0.3) for op in ("ShearX", "ShearY", "TranslateX", "TranslateY")}
    return {**_BLENDS, "Posterize": (4, 8), "Rotate": (sign * 30, 30), "Solarize": solarize, **moves}


@dataclass(frozen=True, eq=False)  # compared by identity, so that functions of a policy can be cached
class Policy:
    """An augmentation, as data. Sizes not in pixels are fractions of the image's width or height.

    The defaults are RandAugmentMC(n=2, m=10) of kekmodel's PyTorch FixMatch, which NorMatch uses.
    """

    num_ops: int = 2  # drawn with replacement from `ops`; 0: the strong view is a second weak one
    # lo, hi of each operation with a parameter
    ranges: dict[str, tuple[float, float]] = field(default_factory=lambda: _ranges(0, (256, 0)))
    levels: int = 10  # > 0: value = lo + (hi - lo) v / levels with an integer v in 1..levels-1; 0: uniform in [lo, hi)
    probability: float = 0.5  # that a drawn operation is applied
    random_sign: bool = True  # negate the value of a geometric operation with probability 1/2
    whole_pixels: bool = True  # translations are truncated to whole pixels
    padding: str = "reflect"  # of the random crop, in the weak views too: "reflect" or "zero"
    ops_first: bool = False  # operations, cutout, flip, crop; otherwise flip, crop, operations, cutout
    cutout_pixels: int = 16  # side of the square, for any image size; 0: drawn from [0, cutout_fraction) of the width
    cutout_fraction: float = 0.0
    cutout_downwards: bool = False  # the center is drawn from (1, W], down from W; otherwise from [0, W)
    cutout_fill: tuple[int, int, int] = (127, 127, 127)
    ops: tuple[str, ...] = OPS
    flip: bool = True  # whether views may be mirrored, where the images allow it


POLICIES = {
    "kekmodel": Policy(),
    # RandAugment(3, 5) of LeeDoYup's PyTorch FixMatch.
    "leedoyup": Policy(
        num_ops=3,
        ranges=_ranges(-1, (0, 256)),
        levels=0,
        probability=1.0,
        random_sign=False,
        whole_pixels=False,
        padding="zero",
        ops_first=True,
        cutout_pixels=0,
        cutout_fraction=0.5,
        cutout_downwards=True,
        cutout_fill=(125, 123, 114),
    ),
}
# RandAugment as the FixMatch paper describes it: the ranges of its appendix (those of LeeDoYup's code), two operations
# of random magnitude on every image, then Cutout; flip and shift come first and reflect, as its weak augmentation does.
POLICIES["fixmatch-paper"] = replace(
    POLICIES["leedoyup"],
    num_ops=2,
    padding="reflect",
    ops_first=False,
    cutout_downwards=False,
    cutout_fill=Policy.cutout_fill,
)
# Flip and shift only: the strong view is a second weak one.
POLICIES["weak"] = replace(POLICIES["kekmodel"], num_ops=0, cutout_pixels=0)
# For densities, whose samples must stay in distribution: two of a slight rotation and slight shears.
POLICIES["affine"] = replace(
    POLICIES["weak"],
    num_ops=2,
    ops=("Rotate", "ShearX", "ShearY"),
    ranges={"Rotate": (0, 20), "ShearX": (0, 0.25), "ShearY": (0, 0.25)},
    levels=0,
    probability=1.0,
)

MAX_OPS, MAX_LEVELS = 8, 32  # limits of the native op


def find_policy(name: str) -> Policy:
    """name: one of POLICIES, or a YAML file of fields; the others come from its `base` (default kekmodel)."""
    if name in POLICIES:
        return POLICIES[name]
    if not str(name).endswith((".yaml", ".yml")):
        raise UserError(
            f"unknown policy {name!r}{nearest(name, POLICIES)}; policies: {', '.join(POLICIES)}, or a YAML file"
        )
    import yaml  # only files need it

    try:
        fields = yaml.safe_load(Path(name).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"policy {name} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise UserError(f"policy {name} must hold `field: value` lines")
    base = str(fields.pop("base", "kekmodel"))
    known = Policy.__dataclass_fields__
    if base not in POLICIES or not fields.keys() <= known.keys():
        wrong = base if base not in POLICIES else next(f for f in fields if f not in known)
        near = nearest(wrong, POLICIES if base not in POLICIES else known)
        raise UserError(f"policy {name}: there is no '{wrong}'{near}; fields are base, {', '.join(known)}")
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        if "ranges" in fields:
            given = {op: (float(lo), float(hi)) for op, (lo, hi) in fields["ranges"].items()}
            fields["ranges"] = POLICIES[base].ranges | given
        policy = replace(POLICIES[base], **fields)
        _check_policy(policy)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"policy {name}: {error}") from None
    return policy


def _check_policy(p: Policy) -> None:
    """Raises ValueError for a policy that cannot be applied."""
    for name, kind in Policy.__annotations__.items():
        value = getattr(p, name)
        if kind not in (int, float, bool, str):  # checked below
            continue
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is {value!r}, not {kind.__name__}")
    unknown = [op for op in (*p.ops, *p.ranges) if op not in OPS]
    shift, shear = (
        max(abs(v) for axis in "XY" for v in p.ranges.get(name + axis, (0, 0))) for name in ("Translate", "Shear")
    )
    limits = {
        f"unknown operation {unknown[:1]}: there are {', '.join(OPS)}": bool(unknown),
        f"num_ops may be 0 to {MAX_OPS}": not 0 <= p.num_ops <= MAX_OPS,
        f"ops may name 1 to {len(OPS)} operations, each once": not p.ops or len(set(p.ops)) < len(p.ops),
        f"levels may be 0 or 2 to {MAX_LEVELS}": p.levels != 0 and not 2 <= p.levels <= MAX_LEVELS,
        "probability may be 0 to 1": not 0 <= p.probability <= 1,
        "ranges must be numbers": not all(math.isfinite(v) for bounds in p.ranges.values() for v in bounds),
        "padding may be reflect or zero": p.padding not in ("reflect", "zero"),
        "cutout_fill must be three levels of 0 to 255": len(p.cutout_fill) != 3
        or any(not isinstance(v, int) or not 0 <= v <= 255 for v in p.cutout_fill),
        "cutout sizes must not be negative": p.cutout_pixels < 0 or not 0 <= p.cutout_fraction <= 1,
        "Posterize keeps 0 to 8 bits": not all(0 <= bits <= 8 for bits in p.ranges.get("Posterize", (4, 8))),
        "TranslateX and TranslateY may move by the image's size at most": shift > 1,
        "ShearX and ShearY may be -2 to 2": shear > 2,
    }
    for message, broken in limits.items():
        if broken:
            raise ValueError(message)


@lru_cache(maxsize=32)
def op_values(policy: Policy, height: int, width: int):
    """-> (14, levels - 1) float32, the value of each operation at v = 1, 2, ...; or (14, 2), its lo and hi.

    Computed in float64 and rounded once, so that it holds the published code's own values. Backends read this table
    instead of repeating the formula.
    """
    levels = policy.levels or 1
    points = range(1, levels) if policy.levels else (0, 1)
    table = np.zeros((len(OPS), len(points)), dtype=np.float32)
    sizes = {"TranslateX": width, "TranslateY": height}
    for op, (lo, hi) in policy.ranges.items():
        for i, point in enumerate(points):
            value = lo + (hi - lo) * point / levels
            if op in sizes:
                value = value * sizes[op]
                value = int(value) if policy.whole_pixels else value
            table[OPS.index(op), i] = value
    table.flags.writeable = False  # cached, hence shared
    return table


@lru_cache(maxsize=32)
def encode_policy(policy: Policy, height: int, width: int, flip: bool) -> tuple[list[int], list[float]]:
    """The policy as the native op takes it -> integers (the operations last), and real numbers."""
    p = policy
    rules = [
        p.num_ops, p.levels, p.random_sign, p.padding == "reflect", p.ops_first, p.cutout_pixels, p.cutout_downwards,
        flip and p.flip, *p.cutout_fill, *(OPS.index(op) for op in p.ops),
    ]  # fmt: skip
    values = [policy.probability, policy.cutout_fraction, *op_values(policy, height, width).reshape(-1).tolist()]
    return [int(rule) for rule in rules], values


def normalization(mean, std) -> tuple[np.ndarray, np.ndarray]:
    """(3,), (3,) of values in [0, 1] -> (3,), (3,) float32 scale, shift: v * scale - shift normalizes v in 0..255."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return 1 / (np.float32(255) * std), mean / std

"""Weak and strong (RandAugment) views of uint8 images, drawn from counters instead of a random state.

    policy   what a view may undergo, as data; YAML files of policies
    draws    words -> flips, crops, operations and cutout boxes of a batch, in arithmetic that backends repeat exactly
    pillow   those applied by Pillow: the reference that all backends are compared with
    native   batches by `normatch.ops.augment_views`        dali   batches by an NVIDIA DALI pipeline

A module imports from those above it and from `data`, whose `philox` turns counters into random words. policy and draws
do without Pillow.
"""

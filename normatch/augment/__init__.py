"""Weak and strong (RandAugment) views of uint8 images, drawn from counters instead of a random state.

    policy   what a view may undergo, as data; YAML files of policies
    philox   counters -> random words, in NumPy and PyTorch
    draws    words -> flips, crops, operations and cutout boxes of a batch, in arithmetic that backends repeat exactly
    pillow   those applied by Pillow: the reference that all backends are compared with
    native   batches by `normatch.ops.augment_views`        dali   batches by an NVIDIA DALI pipeline

Imports go down this list to the top of it. policy, philox and draws import NumPy alone; nothing imports training.
"""

"""Philox4x32-10, the counter-based random generator of views and dropout masks, in NumPy and PyTorch."""

import numpy as np

WORD = 0xFFFFFFFF


def philox(counter, key):
    """counter: four arrays that broadcast, key: two words -> four arrays of words (Salmon et al., SC 2011).

    Words are 32-bit numbers in 64-bit integers: NumPy arrays of uint64, or int64 tensors, whose products wrap to the
    same bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & WORD) ^ c1 ^ k0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def split_key(seed):
    """seed: int, or () int64 -> its low and its high 32 bits, Philox's key."""
    return seed & WORD, (seed >> 32) & WORD


def random_words(seed: int, visit, samples, view, count: int) -> np.ndarray:
    """visit, view: int or (N,), samples: (N,) -> (N, count) uint32.

    Word w is word w % 4 of the block with counter (w // 4, view, sample, visit); the key is `split_key(seed)`.
    """
    samples = np.asarray(samples)
    columns = (np.broadcast_to(value, samples.shape)[:, None].astype(np.uint32) for value in (view, samples, visit))
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    counter = [blocks, *(column.astype(np.uint64) for column in columns)]
    words = np.stack(philox(counter, split_key(seed)), axis=-1).astype(np.uint32)
    return words.reshape(len(samples), 4 * len(blocks))[:, :count]

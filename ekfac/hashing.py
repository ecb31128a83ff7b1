"""Random numbers as functions of a key: the same on every device, in every library version, in any order and any batch.

NumPy's generators promise no stable streams between versions, and what is stored (labels behind factors, the signs behind rows) must be drawn
again years later.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def key_of(text: str) -> int:
    """64 bits that stand for a text (a sequence's id, a layer's name) in random draws."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_bits(seed: int, keys: NDArray[np.uint64], count: int, first: int = 0) -> NDArray[np.uint64]:
    """64 random bits for each key and each of `count` indices from `first` on, [N, count], from (seed, key, index) alone."""
    start = _mix(keys.astype(np.uint64) ^ _mix(np.array([seed % 2**64], dtype=np.uint64)))
    return _mix(start[:, None] + np.arange(first, first + count, dtype=np.uint64)[None, :] * np.uint64(0x9E3779B97F4A7C15))


def keyed_uniforms(seed: int, keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Uniforms in [0, 1) for each key and each index below `count`, [N, count]."""
    return (keyed_bits(seed, keys, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on 64-bit integers that wrap."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""Randomness by position: every random number is a function of (seed, purpose, position).

No generator lives longer than one use, and no generator state has to be saved. A run may stop at any step and resume
on any number of processes: the same image of the same step gets the same noise.

The streams are numpy's SeedSequence (O'Neill's seed_seq, hashed entropy). Neighbouring positions are as independent as
different seeds. The idea is that of EDM2 (Karras et al., arXiv 2312.02696), which seeds each step by its number.
"""

import random
import zlib

import numpy as np
from jaxtyping import Int64


def position_sequence(seed: int, purpose: str, *position: int) -> np.random.SeedSequence:
    """The entropy of one use. `purpose` names the use, such as "noise"; `position` consists of integers >= 0."""
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *position])


def position_rng(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A numpy generator for one use at one position."""
    return np.random.Generator(np.random.PCG64(position_sequence(seed, purpose, *position)))


def position_normal(shape: tuple[int, ...], seed: int, purpose: str, *position: int) -> np.ndarray:
    """Standard normal float32 numbers for one use at one position."""
    return position_rng(seed, purpose, *position).standard_normal(shape, np.float32)


def position_random(seed: int, purpose: str, *position: int) -> random.Random:
    """A `random.Random` for one use at one position. The caption rules need one, because the reference's use it."""
    state = position_sequence(seed, purpose, *position).generate_state(4, np.uint32)
    return random.Random(int.from_bytes(state.tobytes(), "little"))


def draw_sample(rows: Int64[np.ndarray, " n"], size: int, purpose: str) -> Int64[np.ndarray, " k"]:
    """A random sample of the rows, in order, the same in each call: all rows if there are no more than `size`."""
    if len(rows) <= size:
        return rows
    return np.sort(position_rng(0, purpose).choice(rows, size, replace=False, shuffle=False))

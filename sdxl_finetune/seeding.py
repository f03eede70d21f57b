"""Randomness by position: every random number is a function of (seed, purpose, position).

Nothing here is a generator that lives on: a run that stops anywhere and goes on, on any number of
processes, draws the same noise for the same image of the same step, because nothing had to be saved.
The streams are numpy's SeedSequence (O'Neill's seed_seq, hashed entropy), so neighbouring positions are
as independent as different seeds. The idea is EDM2's (Karras et al., arXiv 2312.02696): the seed of a step
is a function of where the step stands.
"""

import random
import zlib

import numpy as np


def position_sequence(seed: int, purpose: str, *position: int) -> np.random.SeedSequence:
    """The entropy of one use: `purpose` names it ("noise", "caption", ...), `position` says where it stands."""
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *position])


def position_rng(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A numpy generator for one use at one position; positions are integers >= 0."""
    return np.random.Generator(np.random.PCG64(position_sequence(seed, purpose, *position)))


def position_random(seed: int, purpose: str, *position: int) -> random.Random:
    """The same as a `random.Random`, which the caption rules draw from as the reference's do."""
    state = position_sequence(seed, purpose, *position).generate_state(4, np.uint32)
    return random.Random(int.from_bytes(state.tobytes(), "little"))

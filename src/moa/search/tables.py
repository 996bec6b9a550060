"""What the entries of a loss table stand for.

A table has one entry for each window that a head may have: entry w is the loss when every key beyond the sink and a
window of ``BLOCK * (w + 1)`` tokens is masked. Plans may have other sinks and finer spans; a head that stores as many
tokens is looked up in the entry of that span or of the next shorter one. About spans below `SHORTEST` tables say
nothing.
"""

import numpy as np

SINK = 64
BLOCK = 64
SHORTEST = SINK + BLOCK


def window_count(length: int) -> int:
    """Entries of a loss table at sequence length ``length``: windows of 1, 2, ... blocks until all keys are kept."""
    return max(1, -(-(length - SINK) // BLOCK))


def entry(spans: np.ndarray) -> np.ndarray:
    """The entry that tells the loss of spans, int64; spans below `SHORTEST` are read in the first one."""
    return np.maximum((spans - SINK) // BLOCK - 1, 0)

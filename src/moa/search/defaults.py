"""What a search takes unless it is told otherwise. The command line shows some of it, so nothing heavy is imported."""

from collections.abc import Collection
from itertools import pairwise

ITEMS, VALIDATION_ITEMS = 24, 12  # of each length and source

# By density, what texts and summaries count beside 1 for retrieval. With an eighth of the KV cache text and facts
# compete for every head, and with more weight on text no head is left for facts; with half there is room for both, and
# summaries keep answers close to the dense model's. From Qwen2.5-0.5B-Instruct, see docs/accuracy.md.
_MEASURED = ((0.125, 1.4, 0.2), (0.25, 2.3, 0.5), (0.5, 0.5, 1.0), (0.75, 0.8, 2.0))


def default_weights(density: float, sources: Collection[str]) -> dict[str, float]:
    """Weights of calibration sources for plans of a density: as measured at four densities, between them interpolated.

    Beyond them the nearest holds.
    """
    within = min(max(_MEASURED[0][0], density), _MEASURED[-1][0])
    (low, *before), (high, *after) = next(pair for pair in pairwise(_MEASURED) if within <= pair[1][0])
    share = (within - low) / (high - low)
    text, summary = (round((1 - share) * a + share * b, 4) for a, b in zip(before, after, strict=True))
    weights = {"retrieval": 1.0, "summary": summary, "text": text}
    return {source: weights[source] for source in sorted(sources)}

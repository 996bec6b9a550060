"""What can go wrong, by type. Every message names what was given, what was expected and what to do."""


class MoAError(Exception):
    """Base of all errors this package raises on purpose; the CLI prints them as one line."""


class PlanError(MoAError):
    """A plan file is damaged, comes from a newer version, or does not fit the model."""


class UnsupportedModelError(MoAError):
    """The model, or the way it was called, cannot carry a plan."""


class CacheError(MoAError):
    """A SpanCache was used in a way that would give wrong results."""


class InputError(MoAError):
    """Text, lengths, paths or options given by the user cannot be used."""


class InfeasibleBudgetError(InputError):
    """No choice of rules meets the density budget.

    Attributes
    ----------
    nearest : dict[int, float]
        For each constrained length, the smallest density that can be met.
    """

    def __init__(self, message: str, nearest: dict[int, float]):
        super().__init__(message)
        self.nearest = nearest

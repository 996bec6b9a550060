"""MoA, Mixture of Attention Spans: find how far back each attention head needs to look, and store only that."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa.cache import SpanCache
    from moa.errors import MoAError
    from moa.plan import ElasticRule, ModelIdentity, Plan
    from moa.runtime import AppliedPlan, apply

__all__ = ["AppliedPlan", "ElasticRule", "MoAError", "ModelIdentity", "Plan", "SpanCache", "apply"]

# Imported when first asked for: they need torch and transformers, which `moa --help` should not wait for.
_MODULES = {
    "AppliedPlan": "moa.runtime",
    "ElasticRule": "moa.plan",
    "MoAError": "moa.errors",
    "ModelIdentity": "moa.plan",
    "Plan": "moa.plan",
    "SpanCache": "moa.cache",
    "apply": "moa.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

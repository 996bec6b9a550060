"""MoA, Mixture of Attention Spans: find how far back each attention head needs to look, and store only that."""

from moa.cache import SpanCache
from moa.errors import MoAError
from moa.plan import ElasticRule, ModelIdentity, Plan
from moa.runtime import AppliedPlan, apply

__all__ = ["AppliedPlan", "ElasticRule", "MoAError", "ModelIdentity", "Plan", "SpanCache", "apply"]

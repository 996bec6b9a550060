"""The plan: one elastic rule per layer and KV head, as frozen data.

A plan says how many keys each KV head stores for a sequence of N tokens: ``span = alpha + beta * N``, rounded up to
whole blocks, at least the sink and one block, at most N. The baselines of the field (dense, one uniform window, binary
heads) are plans as well, so that one engine runs them all.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from moa.errors import InputError, PlanError, UnsupportedModelError
from moa.files import read_json, write_json

SCHEMA = 1
SINK = 4
BLOCK = 16
_PUBLISHED_SINK, _PUBLISHED_BLOCK = 64, 64
PLAN_FILE = "plan.json"

_FINGERPRINT_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "layer_types",
    "sliding_window",
)


def elastic_spans(
    alpha: np.ndarray | float, beta: np.ndarray | float, length: int, sink: int = SINK, block: int = BLOCK
) -> np.ndarray:
    """Spans of elastic rules at one sequence length.

    Parameters
    ----------
    alpha, beta : arrays of one shape
        The rules; alpha in tokens, beta in tokens per token.
    length : int
        N, prompt and new tokens.
    sink, block : int
        Tokens always seen, and the multiple to which a span is rounded up.

    Returns
    -------
    int64 array of the same shape
        ``block * ceil((alpha + beta * N) / block)``, at least ``block * ceil((sink + block) / block)`` and at most N.
    """
    blocks = np.ceil((np.asarray(alpha, np.float64) + np.asarray(beta, np.float64) * length) / block - 1e-6)
    least = -(-(sink + block) // block)
    return np.minimum(np.maximum(blocks, least) * block, length).astype(np.int64)


@dataclass(frozen=True)
class ElasticRule:
    """How one head's span grows with the sequence length N: ``span = alpha + beta * N``."""

    alpha: float
    beta: float

    def span(self, length: int, sink: int = SINK, block: int = BLOCK) -> int:
        """Keys stored at sequence length ``length``."""
        return int(elastic_spans(self.alpha, self.beta, length, sink, block))


@dataclass(frozen=True)
class ModelIdentity:
    """What a plan must agree with to be applied to a model.

    ``fingerprint`` is a hash of the structural fields of the config; an empty one (an imported plan) matches any.
    """

    model_type: str
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    fingerprint: str = ""

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelIdentity":
        """Identity of the (text part of the) model with this transformers config.

        Raises
        ------
        UnsupportedModelError
            If its layers differ in their heads.
        """
        text = config.get_text_config(decoder=True)
        try:
            return cls._of_text(text)
        except RuntimeError as error:  # transformers' own, about what has no one value for all layers
            raise UnsupportedModelError(
                f"{text.model_type}: plans are for models whose layers have the same KV heads ({error})"
            ) from error

    @classmethod
    def _of_text(cls, text: Any) -> "ModelIdentity":
        query_heads = text.num_attention_heads
        structure = {name: _plain(getattr(text, name, None)) for name in _FINGERPRINT_FIELDS}
        structure["rope"] = _plain(getattr(text, "rope_parameters", None))
        canonical = json.dumps(structure, sort_keys=True, default=str)
        return cls(
            model_type=text.model_type,
            layers=text.num_hidden_layers,
            kv_heads=getattr(text, "num_key_value_heads", None) or query_heads,
            query_heads=query_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // query_heads,
            fingerprint=hashlib.sha256(canonical.encode()).hexdigest()[:16],
        )

    def __str__(self) -> str:
        return (
            f"{self.model_type or 'any type'}, {self.layers} layers, {self.query_heads} query and {self.kv_heads} KV "
            f"heads of {self.head_dim}" + (f", config {self.fingerprint}" if self.fingerprint else "")
        )


Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Plan:
    """One elastic rule per layer and KV head, for a whole model.

    Attributes
    ----------
    model : ModelIdentity
        The model the plan was made for.
    alpha, beta : tuple of tuples, [layers][kv_heads]
        The rules (see `elastic_spans`).
    sink, block : int
        Tokens that every head always sees, and the granularity of spans.
    provenance : dict
        Where the plan comes from: calibration data, lengths, budget, solver gap, losses, versions. JSON values.
    """

    model: ModelIdentity
    alpha: Matrix
    beta: Matrix
    sink: int = SINK
    block: int = BLOCK
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        shape = (self.model.layers, self.model.kv_heads)
        for name, rows in (("alpha", self.alpha), ("beta", self.beta)):
            if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
                found = f"{len(rows)} x {sorted({len(row) for row in rows})}"
                raise PlanError(f"plan: {name} is {found}, but the model has {shape[0]} layers x {shape[1]} KV heads")
            if not all(math.isfinite(value) for row in rows for value in row):
                raise PlanError(f"plan: {name} holds a value that is not a finite number")
        if self.sink < 0 or self.block < 1:
            raise PlanError(f"plan: sink {self.sink} and block {self.block} must be at least 0 and 1")

    @classmethod
    def from_arrays(
        cls,
        model: ModelIdentity,
        alpha: np.ndarray,
        beta: np.ndarray,
        sink: int = SINK,
        block: int = BLOCK,
        provenance: Mapping[str, Any] | None = None,
    ) -> "Plan":
        """Plan from arrays [layers, kv_heads]."""
        return cls(model, _matrix(alpha), _matrix(beta), sink, block, dict(provenance or {}))

    def spans(self, length: int) -> np.ndarray:
        """Keys stored by every head at sequence length ``length``, sink included: int64 [layers, kv_heads]."""
        return elastic_spans(np.array(self.alpha), np.array(self.beta), length, self.sink, self.block)

    def density(self, length: int) -> float:
        """Stored KV tokens over all KV tokens at sequence length ``length``, sink included."""
        return float(self.spans(length).mean() / length)

    def kv_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Bytes of K and V stored for one sequence of ``length`` tokens."""
        return int(self.spans(length).sum()) * 2 * self.model.head_dim * dtype.itemsize

    def check_fits(self, model: ModelIdentity) -> None:
        """Raise `PlanError` if the plan was not made for this model; the message names both."""
        mine = asdict(self.model)
        for name, value in asdict(model).items():
            # an imported plan may not know the type, the head size or the config
            if mine[name] and mine[name] != value:
                raise PlanError(
                    f"the plan is for another model: it was made for ({self.model}) but is applied to ({model}); "
                    f"they differ in {name}. Search a plan for this model"
                )

    # Baselines -------------------------------------------------------------------------------------------------------

    @classmethod
    def dense(cls, model: ModelIdentity) -> "Plan":
        """Every head keeps everything."""
        return cls.per_layer(model, [1.0] * model.layers)._labelled("dense")

    @classmethod
    def uniform(cls, model: ModelIdentity, density: float) -> "Plan":
        """One window for all heads, as in StreamingLLM: sink and most recent tokens, ``density * N`` in all."""
        return cls.per_layer(model, [density] * model.layers)._labelled(f"uniform {density}")

    @classmethod
    def per_layer(cls, model: ModelIdentity, densities: Sequence[float]) -> "Plan":
        """One window per layer, ``densities[layer] * N`` keys each."""
        for density in densities:
            check_density(density)
        beta = np.repeat(np.array(densities, np.float64)[:, None], model.kv_heads, axis=1)
        return cls.from_arrays(model, np.zeros_like(beta), beta, provenance={"baseline": "per layer"})

    @classmethod
    def binary_heads(cls, model: ModelIdentity, full: np.ndarray, window: int = 256) -> "Plan":
        """Full heads and streaming heads, as in DuoAttention.

        Parameters
        ----------
        full : bool array [layers, kv_heads]
            Heads that keep everything; the others keep the sink and ``window`` recent tokens.
        """
        beta = np.asarray(full, np.float64)
        return cls.from_arrays(
            model, np.where(beta > 0, 0.0, float(SINK + window)), beta, provenance={"baseline": "binary heads"}
        )

    def _labelled(self, name: str) -> "Plan":
        return Plan(self.model, self.alpha, self.beta, self.sink, self.block, {"baseline": name})

    # Files -----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with its schema version."""
        return {
            "schema": SCHEMA,
            "model": asdict(self.model),
            "sink": self.sink,
            "block": self.block,
            "alpha": [list(row) for row in self.alpha],
            "beta": [list(row) for row in self.beta],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Any, name: str = "plan") -> "Plan":
        """Plan from its JSON form; ``name`` says in errors where it came from.

        Raises
        ------
        PlanError
            If the schema version is unknown or a field is missing or damaged.
        """
        if not isinstance(data, dict):
            raise PlanError(f"{name} is not a plan: expected a JSON object, found {type(data).__name__}")
        if "schema" not in data and {"alphas", "betas"} <= data.keys():
            raise PlanError(f"{name} is in the published format; import it with `moa convert` or Plan.from_published")
        if data.get("schema") != SCHEMA:
            raise PlanError(
                f"{name} has plan schema {data.get('schema')!r}, this version of MoA reads schema {SCHEMA}; "
                "install the version of moa-spans that wrote it"
            )
        try:
            return cls(
                ModelIdentity(**data["model"]),
                _matrix(data["alpha"]),
                _matrix(data["beta"]),
                int(data["sink"]),
                int(data["block"]),
                dict(data["provenance"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{name} is a damaged plan file ({type(error).__name__}: {error})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, all or nothing."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan written by `save`.

        Raises
        ------
        PlanError
            If the file is missing, damaged or of another schema version.
        """
        try:
            return cls.from_dict(read_json(path), str(path))
        except InputError as error:
            raise PlanError(str(error)) from error

    @classmethod
    def from_published(cls, data: Mapping[str, Any], model: ModelIdentity) -> "Plan":
        """Import a plan of the published code: ``{"alphas": [layer][query head], "betas": ...}``.

        Its spans do not count the sink, so the sink is added here; a KV head takes the largest rule of its group of
        query heads (the one with the largest span at 8k tokens).

        Raises
        ------
        PlanError
            If the lists do not have one rule per layer and query head of ``model``.
        """
        try:
            alphas, betas = np.array(data["alphas"], np.float64), np.array(data["betas"], np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"not a published plan: expected alphas and betas as [layer][query head] ({error})"
            ) from error
        if alphas.shape != (model.layers, model.query_heads) or betas.shape != alphas.shape:
            raise PlanError(
                f"the published plan has rules {alphas.shape} and {betas.shape}, but the model ({model}) needs "
                f"({model.layers}, {model.query_heads})"
            )
        grouped = (model.layers, model.kv_heads, model.query_heads // model.kv_heads)
        alphas, betas = alphas.reshape(grouped), betas.reshape(grouped)
        largest = (alphas + betas * 8192).argmax(axis=2)[:, :, None]
        return cls.from_arrays(
            model,
            np.take_along_axis(alphas, largest, 2)[:, :, 0] + _PUBLISHED_SINK,
            np.take_along_axis(betas, largest, 2)[:, :, 0],
            _PUBLISHED_SINK,
            _PUBLISHED_BLOCK,
            provenance={"imported": "published MoA format"},
        )

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], revision: str | None = None) -> "Plan":
        """Load ``plan.json`` from a local folder or from a repository of the Hugging Face Hub."""
        folder = Path(name)
        if folder.is_dir():
            return cls.load(folder / PLAN_FILE)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return cls.load(hf_hub_download(str(name), PLAN_FILE, revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise PlanError(f"no plan at {name!r}: neither a folder with {PLAN_FILE} nor a hub repository") from error

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload the plan as ``plan.json`` to a hub repository (made if needed); returns its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / PLAN_FILE)
            commit = api.upload_file(
                path_or_fileobj=str(Path(folder) / PLAN_FILE), path_in_repo=PLAN_FILE, repo_id=repo_id
            )
        return str(commit)


def check_density(density: float) -> None:
    """Raise `InputError` unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise InputError(f"density {density} is not possible: give a share of the KV cache above 0 and at most 1")


def _plain(value: Any) -> Any:
    """The same value however a config file writes it: 100000 and 100000.0 are one number."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _matrix(rows: Any) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in rows)

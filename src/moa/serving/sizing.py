"""How many sequences fit: the KV memory of a served plan, by arithmetic, without vLLM and without a GPU.

vLLM gives every request whole pages: each group of heads holds those of its sink, those of its window, and one more
where the window does not begin with a page. While a prompt is read, a window is longer by the tokens of a step; what
vLLM prints at its start as "maximum concurrency" counts those, too.
"""

from dataclasses import asdict, dataclass
from typing import Any

from moa.errors import InputError
from moa.plan import ModelIdentity, Plan
from moa.serving.groups import HeadGroups, head_groups

BLOCK = 16  # tokens of a page, vLLM's default on a GPU
IN_USE = 0.92  # of a GPU's memory: vLLM's --gpu-memory-utilization
ACTIVATIONS = 2e9  # bytes that vLLM sets apart on each GPU; assumed, since it measures them at its start


@dataclass(frozen=True)
class Size:
    """What serving one model takes at one length.

    Attributes
    ----------
    model, method : str
        ``method`` is ``dense`` or the plan's name.
    length, ranks : int
        Tokens of every sequence, and GPUs that share the model.
    density : float
        Of what is served, after heads are put in groups.
    kv_gb : float
        Pages of one sequence while it decodes, on all ranks together, 1e9 bytes.
    free_gb : float
        Memory for pages, on all ranks together; below 0 where the weights do not fit.
    sequences : int
        That fit at once.
    """

    model: str
    method: str
    length: int
    ranks: int
    density: float
    kv_gb: float
    free_gb: float
    sequences: int


def request_pages(groups: HeadGroups, block: int, in_flight: int = 1) -> int:
    """Pages of one sequence of ``groups.length`` tokens, in all groups of a rank together, at most.

    Parameters
    ----------
    groups : HeadGroups
    block : int
        Tokens of a page.
    in_flight : int
        Tokens of a step: 1 while a sequence decodes, vLLM's ``max_num_batched_tokens`` while its prompt is read.
    """
    every = -(-groups.length // block)
    sink = groups.plan.sink
    pages = 0
    for span in groups.spans.tolist():
        window = min(span - sink - 1 + in_flight, groups.length)
        pages += min(-(-window // block) + 1 + -(-sink // block), every)
    return pages


def page_bytes(groups: HeadGroups, block: int, element: int) -> int:
    """Bytes of a page: keys and values of ``block`` tokens for the heads of a group on one rank."""
    return groups.size * block * 2 * groups.plan.model.head_dim * element


def sizes(
    name: str,
    identity: ModelIdentity,
    weight_bytes: float,
    plans: dict[str, Plan],
    length: int,
    ranks: int,
    memory: float,
    block: int = BLOCK,
    element: int = 2,
    deals: bool = True,
) -> list[Size]:
    """Dense and under each plan, at one length.

    Parameters
    ----------
    name : str
    identity : ModelIdentity
    weight_bytes : float
        Of all ranks together.
    plans : dict of name to Plan
    length : int
        Of every sequence, and N of the plans' rules.
    ranks : int
        GPUs that share the model.
    memory : float
        Bytes of each GPU.
    block : int
        Tokens of a page.
    element : int
        Bytes of a key's or value's number.
    deals : bool
        As for `head_groups`.

    Raises
    ------
    InputError
        If a number is below 1.
    PlanError
        If so many ranks cannot share the KV heads equally.
    """
    if min(length, ranks, memory, block) < 1:
        raise InputError("a length, a number of GPUs, their memory and a page need at least 1 each")
    free = IN_USE * memory * ranks - weight_bytes - ACTIVATIONS * ranks
    rows = []
    for method, plan in {"dense": Plan.dense(identity), **plans}.items():
        groups = head_groups(plan, length, ranks, deals=deals)
        each = request_pages(groups, block) * page_bytes(groups, block, element) * ranks
        rows.append(
            Size(name, method, length, ranks, groups.density, each / 1e9, free / 1e9, max(0, int(free // each)))
        )
    return rows


def to_json(rows: list[Size], memory: float, block: int) -> dict[str, Any]:
    """What the result file holds, without the command."""
    assumed = {
        "gpu_gb": memory / 1e9,
        "in_use": IN_USE,
        "activations_gb": ACTIVATIONS / 1e9,
        "block": block,
    }
    return {"assumed": assumed, "rows": [asdict(row) for row in rows]}


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    assumed = result["assumed"]
    lines = [
        f"`{result['command']}`: arithmetic for GPUs of {assumed['gpu_gb']:g} GB, of which {assumed['in_use']:.0%} are "
        f"used and {assumed['activations_gb']:g} GB set apart for activations; pages of {assumed['block']} tokens.",
        "",
        "| model | GPUs | N | method | density served | KV GB a sequence | GB for KV | sequences |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['model']} | {row['ranks']} | {row['length']} | {row['method']} | {row['density']:.3f} | "
        f"{row['kv_gb']:.2f} | {row['free_gb']:.1f} | {row['sequences']} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"

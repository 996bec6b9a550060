"""`moa bench attention`: our kernels on a GPU, next to dense attention and to the other ways of running the same mask.

Every figure is the median of CUDA-event times of a captured graph, so that no launch from Python is in it. A floor goes
beside it: for decoding the bytes of the K and V that are read over the bandwidth of a large copy, for a prompt the
operations of the visible keys over the rate of a large matrix product, both measured in the same run.

"mix": half of the KV heads see N / 8, a quarter N / 2, a quarter N, and the sink of 64 tokens besides.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch.nn.attention import SDPBackend, sdpa_kernel

from moa.attention import kernels
from moa.attention.options import AttentionOptions
from moa.errors import InputError
from moa.progress import SILENT, Progress
from moa.storage import SpanStore

_DEVICE = torch.device("cuda")
_DTYPE = torch.bfloat16
_DIM = 128
_SINK = 64  # as in the paper
_DENSE = ("SDPA flash, dense", "SDPA cuDNN, dense")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes
    ----------
    op, case, backend : str
    ms : float
        Median time.
    floor_ms : float
        The least time the masked work can take.
    fraction : float
        floor_ms / ms.
    ratio_to_best_dense : float
        ms over the time of the fastest dense backend in the same case.
    """

    op: str
    case: str
    backend: str
    ms: float
    floor_ms: float
    fraction: float
    ratio_to_best_dense: float


@dataclass(frozen=True)
class _Case:
    name: str
    rows: int
    kv_heads: int
    group: int
    length: int
    mixed: bool = True


_DECODE = (
    _Case("15 rows x 32 KV heads, N 8k", 15, 32, 1, 8192),
    _Case("64 rows x 8 KV heads, group 4, N 8k", 64, 8, 4, 8192),
    _Case("1 row x 32 KV heads, N 128k", 1, 32, 1, 131072),
    _Case("4 rows x 8 KV heads, group 7, N 32k", 4, 8, 7, 32768),
    _Case("1 row x 8 KV heads, N 8k", 1, 8, 1, 8192),
)
_PREFILL = tuple(
    _Case(f"{32}/{kv} heads, N {length // 1024}k, {'mix' if mixed else 'full'}", 1, kv, 32 // kv, length, mixed)
    for length in (32768, 8192)
    for kv in (32, 8)
    for mixed in (True, False)
)


def bench_attention(progress: Progress = SILENT) -> dict[str, Any]:
    """Measure all cases; returns what the result file holds, without the command.

    Raises
    ------
    InputError
        If there is no NVIDIA GPU.
    """
    if not torch.cuda.is_available():
        raise InputError("moa bench attention needs an NVIDIA GPU, and PyTorch sees none here")
    torch.manual_seed(0)
    copy_tb_s, flops = _copy_rate(), _matmul_rate()
    rows: list[Row] = []
    for case in progress.track(_DECODE, "decode"):
        rows += _rows("decode", case, _decode_floor(case, copy_tb_s), _decode_methods(case))
        torch.cuda.empty_cache()
    for case in progress.track(_PREFILL, "prefill"):
        rows += _rows("prefill", case, _prefill_floor(case, flops), _prefill_methods(case))
        torch.cuda.empty_cache()
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": _triton_version(), "cuda": torch.version.cuda},
        "copy_tb_s": copy_tb_s,
        "matmul_tflop_s": flops / 1e12,
        "rows": [asdict(row) for row in rows],
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"`{result['command']}` on {result['device']}, {versions}; copy {result['copy_tb_s']:.2f} TB/s, bf16 matrix "
        f"product {result['matmul_tflop_s']:.0f} TFLOP/s. bf16, head_dim {_DIM}.",
        "",
        "| op | case | backend | ms | floor ms | fraction of floor | time / best dense |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['op']} | {row['case']} | {row['backend']} | {row['ms']:.4f} | {row['floor_ms']:.4f} | "
        f"{row['fraction']:.2f} | {row['ratio_to_best_dense']:.2f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


Methods = Iterator[tuple[str, Callable[[], Any]]]


def _rows(op: str, case: _Case, floor_ms: float, methods: Methods) -> list[Row]:
    times = {}
    for name, run in methods:
        times[name] = _milliseconds(run)
    dense = min(times[name] for name in _DENSE if name in times)
    return [Row(op, case.name, name, ms, floor_ms, floor_ms / ms, ms / dense) for name, ms in times.items()]


def _spans(case: _Case) -> np.ndarray:
    """int64 [rows, kv_heads]."""
    n, heads = case.length, case.kv_heads
    spans = np.full(heads, n)
    if case.mixed:
        spans[: heads // 2] = n // 8 + _SINK
        spans[heads // 2 : heads // 2 + heads // 4] = n // 2 + _SINK
    return np.repeat(np.random.default_rng(0).permutation(spans)[None], case.rows, axis=0)


def _decode_floor(case: _Case, copy_tb_s: float) -> float:
    return float(_spans(case).sum()) * _DIM * 2 * _DTYPE.itemsize / copy_tb_s / 1e9


def _prefill_floor(case: _Case, flops: float) -> float:
    n = case.length
    i = np.arange(n)
    seen = 0
    for span in _spans(case)[0]:
        window = span - _SINK
        seen += int(np.minimum(i + 1, np.maximum(window, 0) + np.minimum(_SINK, np.maximum(i + 1 - window, 0))).sum())
    return 4 * _DIM * seen * case.group / flops * 1e3


def _decode_methods(case: _Case) -> Methods:
    """Every method reads caches that do not fit in L2 (or, in the small case, that do, as in a real small batch)."""
    rows, heads, group, n = case.rows, case.kv_heads, case.group, case.length
    spans = _spans(case)
    query = torch.randn(rows, heads * group, 1, _DIM, device=_DEVICE, dtype=_DTYPE)
    new = torch.randn(rows, heads, 1, _DIM, device=_DEVICE, dtype=_DTYPE)
    store = SpanStore(spans, _SINK, new, new)
    store.keys.normal_()
    store.values.normal_()
    store.written += store.capacity + 7  # every ring is full
    options = AttentionOptions(_DIM**-0.5)
    yield "MoA Triton", lambda: kernels.attend(store, query, new, new, None, options)

    from torch.nn.attention.varlen import varlen_attn

    pairs = rows * heads
    order = torch.from_numpy(store.order).to(_DEVICE)
    queries = query.view(pairs, group, _DIM).index_select(0, order).reshape(-1, 1, _DIM)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(store.capacity[store.order])])).to(_DEVICE, torch.int32)
    q_starts = torch.arange(pairs + 1, device=_DEVICE, dtype=torch.int32) * group
    flat_k, flat_v = store.keys[:, None], store.values[:, None]
    longest = int(store.capacity.max())
    yield (
        "varlen_attn, (row, KV head) flattened",
        lambda: varlen_attn(queries, flat_k, flat_v, q_starts, starts, group, longest),
    )

    key, value = (torch.randn(rows, heads, n, _DIM, device=_DEVICE, dtype=_DTYPE) for _ in range(2))
    packed = query.view(rows, heads, group, _DIM)  # the query heads of a group as queries of one head
    for name, backend in zip(_DENSE, (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION), strict=True):
        yield name, _under(backend, lambda: F.scaled_dot_product_attention(packed, key, value))


def _prefill_methods(case: _Case) -> Methods:
    heads, group, n = case.kv_heads, case.group, case.length
    spans = _spans(case)
    query = torch.randn(1, n, heads * group, _DIM, device=_DEVICE, dtype=_DTYPE).transpose(1, 2)
    key, value = (torch.randn(1, n, heads, _DIM, device=_DEVICE, dtype=_DTYPE).transpose(1, 2) for _ in range(2))
    options = AttentionOptions(_DIM**-0.5)
    counts = torch.from_numpy(spans.reshape(-1).astype(np.int32)).to(_DEVICE)
    nothing = torch.zeros_like(counts)
    yield (
        "MoA Triton",
        lambda: kernels.prefill_kernel(
            query,
            key,
            value,
            key,
            value,
            nothing,
            counts,
            nothing,
            nothing[:1],
            _SINK,
            False,
            False,
            options.scaling,
            0.0,
            None,
        ),
    )
    dense_q, dense_k, dense_v = query.contiguous(), key.contiguous(), value.contiguous()
    dense_k, dense_v = (tensor.repeat_interleave(group, dim=1) for tensor in (dense_k, dense_v))
    for name, backend in zip(_DENSE, (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION), strict=True):
        yield name, _under(backend, lambda: F.scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=True))

    from torch.nn.attention.flex_attention import flex_attention

    mask = _block_mask(torch.from_numpy(np.repeat(spans[0], group)).to(_DEVICE), n)
    flex = torch.compile(flex_attention, dynamic=False)
    yield "FlexAttention, same mask", lambda: flex(dense_q, dense_k, dense_v, block_mask=mask)


def _block_mask(spans: torch.Tensor, length: int, block: int = 128) -> Any:
    """FlexAttention's mask of spans int64 [heads] over whole blocks, without ever making [length, length]."""
    from torch.nn.attention.flex_attention import BlockMask

    window = (spans - _SINK)[:, None, None]
    i = torch.arange(length // block, device=_DEVICE)[None, :, None]
    j = torch.arange(length // block, device=_DEVICE)[None, None, :]
    some = (j <= i) & ((j * block < _SINK) | ((i - j) * block - (block - 1) < window))
    all_seen = (j < i) & (((j + 1) * block <= _SINK) | ((i - j) * block + block - 1 < window))

    def lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1).int()[None], order.int()[None]

    limits = spans - _SINK

    def seen(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & ((k < _SINK) | (q - k < limits[head]))

    partial, full = lists(some & ~all_seen), lists(all_seen)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=block, mask_mod=seen)


def _under(backend: SDPBackend, run: Callable[[], Any]) -> Callable[[], Any]:
    def with_backend() -> Any:
        with sdpa_kernel(backend):
            return run()

    return with_backend


def _milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of one call, from replays of a graph that holds enough calls for a millisecond."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # graphs want their warm-up on a stream of its own
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    few = 4
    replay = _captured(run, few)
    calls = max(1, min(100, round(few / _timed(replay))))
    replay = _captured(run, calls)
    return statistics.median(_timed(replay) for _ in range(repeats)) / calls


def _captured(run: Callable[[], Any], calls: int) -> Callable[[], None]:
    """So many calls as one graph, replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    return graph.replay


def _timed(run: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def _copy_rate() -> float:
    """TB/s of a large device-to-device copy, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=_DEVICE)
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source)) for _ in range(20)]  # in a graph it would be the slower copy engine's
    return 2 * source.numel() / statistics.median(times) / 1e9


def _matmul_rate() -> float:
    """FLOP/s of a large bf16 matrix product on random data."""
    a, b = (torch.randn(8192, 8192, device=_DEVICE, dtype=_DTYPE) for _ in range(2))
    return 2 * 8192**3 / _milliseconds(lambda: a @ b) * 1e3


def _triton_version() -> str:
    import triton

    return str(triton.__version__)

"""Gradients of key and value on an NVIDIA GPU: a program holds a tile of keys, walks over the rows that see it, and
adds up what they give."""

import triton
import triton.language as tl

from moa.attention.triton_decode import LOG2_E, softcapped


@triton.jit
def logits(products, scale_log2, softcap, SOFTCAP: tl.constexpr):
    """Logits in units of log2, and the slope of the soft cap there."""
    s = products * scale_log2
    slope = s
    if SOFTCAP:
        s = softcapped(s, softcap)
        tanh = s / (softcap * LOG2_E)
        slope = 1 - tanh * tanh
    return s, slope


@triton.jit
def _column_tile(
    k,
    v,
    d_k,
    d_v,
    m,
    n,
    head,
    q_at,
    o_at,
    lse,
    row_mean,
    d,
    scale_log2,
    softcap,
    length,
    window,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Add what a tile of rows gives to the gradients of keys and values."""
    live = m < length
    row_mask = live[:, None] & (d < D)[None, :]
    q = tl.load(q_at, mask=row_mask, other=0.0)
    d_o = tl.load(o_at, mask=row_mask, other=0.0)
    row_at = head.to(tl.int64) * length + m
    row_lse = tl.load(lse + row_at, mask=live, other=float("inf"))
    mean = tl.load(row_mean + row_at, mask=live, other=0.0)
    s, slope = logits(tl.dot(k, tl.trans(q), input_precision="ieee"), scale_log2, softcap, SOFTCAP)
    p = tl.exp2(s - row_lse[None, :])
    if MASKED:
        p = tl.where((n[:, None] <= m[None, :]) & (m[None, :] - n[:, None] < window), p, 0.0)
    d_v = tl.dot(p.to(d_o.dtype), d_o, d_v, input_precision="ieee")
    d_logits = p * (tl.dot(v, tl.trans(d_o), input_precision="ieee") - mean[None, :])
    if SOFTCAP:
        d_logits = d_logits * slope
    d_k = tl.dot(d_logits.to(q.dtype), q, d_k, input_precision="ieee")
    return d_k, d_v


@triton.jit
def column_kernel(
    query,
    key,
    value,
    d_out,
    lse,
    row_mean,
    d_key,
    d_value,
    scaling,
    scale_log2,
    softcap,
    length,
    window,
    kv_heads,
    q_head,
    q_token,
    k_head,
    k_token,
    v_head,
    v_token,
    o_head,
    o_token,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N  # early keys are seen by the most rows and start first
    kv_head = tl.program_id(1)
    n = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_TILE)
    key_mask = (n < length)[:, None] & (d < D)[None, :]
    k = tl.load(
        key + kv_head.to(tl.int64) * k_head + n[:, None].to(tl.int64) * k_token + d[None, :], mask=key_mask, other=0.0
    )
    v = tl.load(
        value + kv_head.to(tl.int64) * v_head + n[:, None].to(tl.int64) * v_token + d[None, :], mask=key_mask, other=0.0
    )
    d_k = tl.zeros([BLOCK_N, D_TILE], tl.float32)
    d_v = tl.zeros([BLOCK_N, D_TILE], tl.float32)
    begin = first // BLOCK_M * BLOCK_M
    open_from = tl.cdiv(first + BLOCK_N - 1, BLOCK_M) * BLOCK_M  # from here on every row sees every key
    end = length
    open_to = length
    if WINDOWED:
        end = tl.minimum(length, first + BLOCK_N - 1 + window)
        open_to = tl.maximum(tl.minimum((first + window) // BLOCK_M * BLOCK_M, end), open_from)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        q_tile = query + head.to(tl.int64) * q_head + m[:, None].to(tl.int64) * q_token + d[None, :]
        o_tile = d_out + head.to(tl.int64) * o_head + m[:, None].to(tl.int64) * o_token + d[None, :]
        for at in range(begin, tl.minimum(open_from, end), BLOCK_M):
            d_k, d_v = _column_tile(
                k,
                v,
                d_k,
                d_v,
                at + m,
                n,
                head,
                q_tile + tl.cast(at, tl.int64) * q_token,
                o_tile + tl.cast(at, tl.int64) * o_token,
                lse,
                row_mean,
                d,
                scale_log2,
                softcap,
                length,
                window,
                D,
                True,
                SOFTCAP,
            )
        for at in range(open_from, open_to, BLOCK_M):
            d_k, d_v = _column_tile(
                k,
                v,
                d_k,
                d_v,
                at + m,
                n,
                head,
                q_tile + tl.cast(at, tl.int64) * q_token,
                o_tile + tl.cast(at, tl.int64) * o_token,
                lse,
                row_mean,
                d,
                scale_log2,
                softcap,
                length,
                window,
                D,
                False,
                SOFTCAP,
            )
        if WINDOWED:
            for at in range(open_to, end, BLOCK_M):
                d_k, d_v = _column_tile(
                    k,
                    v,
                    d_k,
                    d_v,
                    at + m,
                    n,
                    head,
                    q_tile + tl.cast(at, tl.int64) * q_token,
                    o_tile + tl.cast(at, tl.int64) * o_token,
                    lse,
                    row_mean,
                    d,
                    scale_log2,
                    softcap,
                    length,
                    window,
                    D,
                    True,
                    SOFTCAP,
                )
    at = (n[:, None].to(tl.int64) * kv_heads + kv_head) * D + d[None, :]
    tl.store(d_key + at, (d_k * scaling).to(d_key.dtype.element_ty), mask=key_mask)
    tl.store(d_value + at, d_v.to(d_value.dtype.element_ty), mask=key_mask)

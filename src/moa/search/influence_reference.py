"""Attention influence by its definition, with N x N matrices: what `moa.search.influence` is tested against."""

from dataclasses import dataclass

import torch

from moa.plan import BLOCK, SINK


@dataclass(frozen=True)
class AttentionInfluence:
    """Attention, its gradients and what masking would cost; every field in the dtype of the query.

    Attributes
    ----------
    out : [query_heads, N, head_dim]
    d_query : [query_heads, N, head_dim]
    d_key, d_value : [kv_heads, N, head_dim]
    joint, paper : [query_heads, W]
        Loss tables of the two estimators; entry w masks every non-sink key at distance ``BLOCK * (w + 1)`` or more.
    """

    out: torch.Tensor
    d_query: torch.Tensor
    d_key: torch.Tensor
    d_value: torch.Tensor
    joint: torch.Tensor
    paper: torch.Tensor


def attention_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention A.

    Parameters
    ----------
    query, key : [query_heads, N, head_dim], [kv_heads, N, head_dim]
    scaling : float
        Factor of the logits.
    softcap : float, optional
        Logits s become ``softcap * tanh(s / softcap)``.
    sliding_window : int, optional
        The model's own window: only keys with i - j < sliding_window are visible.
    sinks : [query_heads], optional
        Learned sinks: one more logit per row, whose value is 0. Its probability is missing from the result.

    Returns
    -------
    [query_heads, N, N]
    """
    heads, length, _ = query.shape
    logits = query @ key.repeat_interleave(heads // key.shape[0], 0).mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distance = key_distances(length, query.device)
    hidden = distance < 0
    if sliding_window is not None:
        hidden |= distance >= sliding_window
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits).view(-1, 1, 1).expand(-1, length, 1)], -1)
    return logits.softmax(-1)[..., :length]


def key_distances(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """``i - j`` of query i and key j: int64 [N, N]."""
    positions = torch.arange(length, device=device)
    return positions[:, None] - positions


def attention_influence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    d_out: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> AttentionInfluence:
    """Attention, its gradients and both loss tables.

    Parameters
    ----------
    query, d_out : [query_heads, N, head_dim]
        ``d_out`` is the gradient of the loss with respect to the output.
    key, value : [kv_heads, N, head_dim]
    scaling, softcap, sliding_window, sinks
        See `attention_probabilities`.

    Notes
    -----
    With A the attention, dA its gradient and R_i = sum_n dA_in A_in (MoA, section "Profile"):

    - one key masked: ``E_ij = A_ij (R_i - dA_ij) / (1 - A_ij)``; the paper's table sums |E_ij| over rows and masked keys;
    - a set masked: ``DL_i = (m R_i - S) / (1 - m)`` with m = sum A_ij and S = sum A_ij dA_ij over the set; the joint
      table sums DL_i^2 over rows.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    group = query.shape[0] // key.shape[0]
    with torch.enable_grad():
        attention = attention_probabilities(leaves[0], leaves[1], scaling, softcap, sliding_window, sinks)
        out = attention @ leaves[2].repeat_interleave(group, 0)
        d_query, d_key, d_value = torch.autograd.grad(out, leaves, d_out)
    a, d_a = attention.detach(), d_out @ value.repeat_interleave(group, 0).mT
    row_mean = (a * d_a).sum(-1, keepdim=True)
    single = torch.where(a < 1, a * (row_mean - d_a) / (1 - a), 0)  # a row with one key cannot lose it

    heads, length, _ = query.shape
    distance = key_distances(length, query.device)
    joint, paper = [], []
    for window in range(BLOCK, max(length - SINK, 1) + BLOCK, BLOCK):
        masked = distance >= window
        masked[:, :SINK] = False
        mass, flow = (a * masked).sum(-1), (a * d_a * masked).sum(-1)
        joint.append(((mass * row_mean[..., 0] - flow) / (1 - mass)).square().sum(-1))
        paper.append((single.abs() * masked).sum((-1, -2)))
    return AttentionInfluence(out.detach(), d_query, d_key, d_value, torch.stack(joint, -1), torch.stack(paper, -1))

"""Attention influence by its definition, with N x N matrices: what `moa.search.influence` is tested against."""

from dataclasses import dataclass

import torch

from moa.attention.options import AttentionOptions
from moa.attention.reference import visible_keys
from moa.search.tables import BLOCK, SINK, window_count


@dataclass(frozen=True)
class AttentionInfluence:
    """Attention, its gradients and what masking would cost; every field in the dtype of the query.

    Attributes
    ----------
    out : [query_heads, N, head_dim]
    d_query : [query_heads, N, head_dim]
    d_key, d_value : [kv_heads, N, head_dim]
    joint, paper : [query_heads, W]
        Loss tables of the two estimators; see `masked_keys`.
    """

    out: torch.Tensor
    d_query: torch.Tensor
    d_key: torch.Tensor
    d_value: torch.Tensor
    joint: torch.Tensor
    paper: torch.Tensor


def masked_keys(length: int, entry: int, sliding_window: int | None = None) -> torch.Tensor:
    """What entry ``entry`` of a loss table masks: the visible keys that a head of span ``SINK + BLOCK * (entry + 1)``
    does not see. bool [N, N].
    """
    return _visible(length, length, sliding_window) & ~_visible(SINK + BLOCK * (entry + 1), length, sliding_window)


def attention_influence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, d_out: torch.Tensor, options: AttentionOptions
) -> AttentionInfluence:
    """Attention, its gradients and both loss tables.

    Parameters
    ----------
    query, d_out : [query_heads, N, head_dim]
        ``d_out`` is the gradient of the loss with respect to the output.
    key, value : [kv_heads, N, head_dim]
    options : AttentionOptions

    Notes
    -----
    With A the attention, dA its gradient and R_i = sum_n dA_in A_in (MoA, section "Profile"):

    - one key masked: ``E_ij = A_ij (R_i - dA_ij) / (1 - A_ij)``; the paper's table sums |E_ij| over all masked keys;
    - a set masked: ``DL_i = (m R_i - S) / (1 - m)`` with m = sum A_ij and S = sum A_ij dA_ij over the set; the joint
      table sums DL_i^2 over rows.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    group = query.shape[0] // key.shape[0]
    with torch.enable_grad():
        attention = _attention(leaves[0], leaves[1], options)
        out = attention @ leaves[2].repeat_interleave(group, 0)
        d_query, d_key, d_value = torch.autograd.grad(out, leaves, d_out)
    a, d_a = attention.detach(), d_out @ value.repeat_interleave(group, 0).mT
    row_mean = (a * d_a).sum(-1, keepdim=True)
    single = torch.where(a < 1, a * (row_mean - d_a) / (1 - a), 0)  # a row with one key cannot lose it

    length = query.shape[1]
    joint, paper = [], []
    for entry in range(window_count(length)):
        masked = masked_keys(length, entry, options.sliding_window)
        mass, flow = (a * masked).sum(-1), (a * d_a * masked).sum(-1)
        joint.append(((mass * row_mean[..., 0] - flow) / (1 - mass)).square().sum(-1))
        paper.append((single.abs() * masked).sum((-1, -2)))
    return AttentionInfluence(out.detach(), d_query, d_key, d_value, torch.stack(joint, -1), torch.stack(paper, -1))


def _attention(query: torch.Tensor, key: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Dense attention A, [query_heads, N, N]; rows sum to less than 1 where a learned sink takes its share."""
    heads, length, _ = query.shape
    logits = query @ key.repeat_interleave(heads // key.shape[0], 0).mT * options.scaling
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logits = logits.masked_fill(~_visible(length, length, options.sliding_window), -torch.inf)
    if options.sink_logits is not None:
        logits = torch.cat([logits, options.sink_logits.to(logits).view(-1, 1, 1).expand(-1, length, 1)], -1)
    return logits.softmax(-1)[..., :length]


def _visible(span: int, length: int, sliding_window: int | None) -> torch.Tensor:
    everything = torch.ones(1, length, dtype=torch.bool)
    return visible_keys(torch.tensor([[span]]), SINK, everything, length, sliding_window)[0, 0]

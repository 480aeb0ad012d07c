"""STAND-IN for flash-attn 2.8.3, which needs a GPU: its semantics over torch's own attention."""

import torch

__version__ = "2.8.3"


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **_):
    """q, k, v: [rows, tokens, heads, width]; a causal mask ends at the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs):
    """q, k, v: [tokens, heads, width]; sequence i is from cu_seqlens[i] to cu_seqlens[i + 1]."""
    lengths = [ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    parts = zip(*(x.split(sizes) for x, sizes in zip((q, k, v), lengths)))
    kwargs.pop("block_table", None)
    return torch.cat([flash_attn_func(*(x[None] for x in part), *args, **kwargs)[0] for part in parts])


def flash_attn_with_kvcache(*args, **kwargs):
    raise NotImplementedError("STAND-IN: nobody asked for this yet")

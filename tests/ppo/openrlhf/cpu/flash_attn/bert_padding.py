"""STAND-IN: what OpenRLHF and transformers import of flash_attn.bert_padding."""

import torch
from einops import rearrange  # noqa: F401


def index_first_axis(x, indices):
    return x[indices]


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """(tokens of the mask, their indices, where sequences end, the longest, lengths)."""
    lengths = attention_mask.sum(1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    return hidden_states.flatten(0, 1)[indices], indices, ends, int(lengths.max()), lengths


def pad_input(hidden_states, indices, batch, seqlen):
    rows = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return rows.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))

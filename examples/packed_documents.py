"""Packed documents: sequences of any length end to end in one tensor, and attention that crosses none of them."""

from itertools import pairwise

import torch
from torch.nn.functional import pad

from fastlm.ops import apply_rotary, attention

torch.manual_seed(0)
lengths = torch.tensor([700, 41, 3, 280])
cu_seqlens = pad(lengths.cumsum(0), (1, 0))  # where each begins, and the end: 0, 700, 741, 744, 1024
total, num_heads, head_dim = int(lengths.sum()), 4, 64
q, k, v = torch.randn(3, total, num_heads, head_dim)

# Positions restart with every document.
positions = torch.cat([torch.arange(int(length)) for length in lengths])
angles = torch.outer(torch.arange(float(lengths.max())), 10000.0 ** (-torch.arange(head_dim // 2) * 2 / head_dim))
q, k = apply_rotary(q, k, angles.cos(), angles.sin(), positions=positions)
packed = attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens)

# The same as each document alone; the cost is the sum of the squared lengths, never the square of the total.
for begin, end in pairwise(cu_seqlens):
    alone = attention(*(x[None, begin:end] for x in (q, k, v)), causal=True)[0]
    print(f"document of {end - begin} tokens: largest difference {(packed[begin:end] - alone).abs().max():.1e}")

"""What the property tests draw. Each bound has its reason."""

import torch
from hypothesis import strategies as st


def seeds():
    """A seed for torch: hypothesis seeds random and numpy but not torch, so the seed is drawn."""
    return st.integers(0, 2**31 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    """Standard normal float64 tensor of a drawn seed."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)

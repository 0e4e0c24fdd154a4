"""What the property tests draw. Each bound has its reason."""

import torch
from hypothesis import strategies as st


def seeds():
    """A seed for a torch.Generator: hypothesis does not know torch's random state, so draw it."""
    return st.integers(0, 2**31 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    """Standard normal float64: large tensors come from a drawn seed, small ones shrink no better."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)

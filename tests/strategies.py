"""What the tests of formulas share. Each bound of a strategy has its reason."""

import pytest
import torch
from hypothesis import strategies as st

# about("kl_standard_normal"): which functions of its chapter a property is about, for --mine.
# about(..., edge=True): a property of edge cases (refused input, extreme values), not the formula.
about = pytest.mark.about


def seeds():
    """A seed for torch: hypothesis seeds random and numpy but not torch, so the seed is sampled."""
    return st.integers(0, 2**31 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    """Standard normal float64 tensor of a sampled seed."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def rejected(prop, twin, *case):
    """The property fails for the wrong twin."""
    try:
        prop(twin, *case)
    except AssertionError:
        return True
    return False

import pytest
import torch


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """What torch.empty returns is NaN, so that a result which reads it cannot be right by luck."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # this is what makes torch fill uninitialized memory
    yield
    torch.use_deterministic_algorithms(False)

"""One thread, so that timings and sums do not depend on the machine; one seed and torch's defaults for every test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before fixtures: what draws from a global generator gets the same numbers whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _torch_defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)

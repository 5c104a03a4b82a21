"""One thread, so that timings and sums do not depend on the machine; one seed and torch's defaults for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]  # of whoever runs them


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker for every core that this process may use (`-n auto`), as long as each has 2 GiB of memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


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

"""What every test can rely on: gpu tests skip without a device, one thread count, no backend forced, signals as they were;
large ones last."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TIMED = Path(__file__).parent / "bench"
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A clock of a training takes the signals and keeps them: the next test has them as they were."""
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)


def pytest_configure(config: pytest.Config) -> None:
    # a backend forced in the caller's shell would change what the tests compare
    os.environ.pop("LENS_OPS_BACKEND", None)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # `make test` looks for them there alone: to collect every test takes longer than to run these
    if elsewhere := [i.nodeid for i in items if i.get_closest_marker("timing") and TIMED not in i.path.parents]:
        raise pytest.UsageError(f"tests marked `timing` lie in tests/bench: {', '.join(elsewhere)}")
    if torch.cuda.is_available():
        items.sort(key=lambda item: item.get_closest_marker("large") is not None)
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

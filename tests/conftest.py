"""What every test can rely on: gpu tests skip without a device, one thread count, no backend forced; large ones last."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # a backend forced in the caller's shell would change what the tests compare
    os.environ.pop("LENS_OPS_BACKEND", None)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        items.sort(key=lambda item: item.get_closest_marker("large") is not None)
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

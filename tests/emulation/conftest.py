"""`emulated`: lens.ops on CPU tensors, run by the CUDA kernels under the emulator."""

import pytest

from lens.ops import backend
from tests.emulation import emulator


@pytest.fixture(scope="session")
def _emulator():
    return emulator.Emulator(emulator.build(emulator.SOURCE))


@pytest.fixture
def emulated(_emulator, monkeypatch):
    """The emulator that serves every launch of the test; it must have been used."""
    _emulator.seed = _emulator.errors = 0
    _emulator.calls.clear()
    monkeypatch.setattr(backend, "launch", _emulator.launch)
    yield _emulator
    assert _emulator.calls, "the test launched no emulated kernel"

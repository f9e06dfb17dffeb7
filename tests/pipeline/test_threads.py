"""CPU threads change no bit of a small model's images, and a fork leaves a process that draws."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from lens.engine import threads
from tests.small_pipeline import fresh, same_bits

CALL = dict(sizes=[(64, 64), (96, 64)], seed=1, num_inference_steps=2, guidance_scale=3.0, output_type="np")


@pytest.fixture
def number():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(number):
    pipe, drawn = fresh(), []
    for n in (1, 2, 3):
        number(n)
        drawn.append([*pipe(["a red apple", "x"], "fog", **CALL).images, *pipe.encode_text("a red apple")[0]])
        assert torch.get_num_threads() == n
        assert pipe.threads == 1
    assert same_bits(drawn[0], drawn[1])
    assert same_bits(drawn[0], drawn[2])


def test_the_number_returns_however_threads_share_it(number):
    number(3)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with threads.one_thread():
            inside.set()
            leave.wait()

    other = threading.Thread(target=hold)
    other.start()
    inside.wait()
    with threads.one_thread(), threads.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    leave.set()
    other.join()
    with pytest.raises(KeyError), threads.one_thread():
        raise KeyError
    assert torch.get_num_threads() == 3


def test_a_large_model_keeps_torchs_threads(number, monkeypatch):
    number(2)
    monkeypatch.setattr(threads, "SMALL_WIDTH", 16)
    pipe, seen = fresh(), []
    pipe(
        "a",
        height=32,
        width=32,
        num_inference_steps=1,
        callback_on_step_end=lambda *_: seen.append(torch.get_num_threads()),
    )
    assert (seen, pipe.threads) == ([2], 2)


@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_process_forked_from_one_that_drew_draws(small):
    """Where the parent had threads, the child has one and says so."""
    program = f"""
import os, sys, warnings
import torch
from lens import LensPipeline
from lens.engine import threads
threads.SMALL_WIDTH = {256 if small else 16}
torch.set_num_threads(2)
pipe = LensPipeline.from_pretrained("mini")
call = dict(seed=1, num_inference_steps=1, output_type="latent")
expected = pipe("a red apple", **call).images
torch.randn(400, 400) @ torch.randn(400, 400)  # whatever else had the threads start
if (child := os.fork()) == 0:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = [pipe("a red apple", **call).images for _ in range(2)]
    close = all(torch.allclose(image, expected, atol=1e-4) for image in images)
    told = ["forked" in str(w.message) for w in caught]
    os._exit(0 if close and told == {[] if small else [True]} else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr

"""The JSONL record and its copy for TensorBoard."""

import builtins
import json

import numpy as np
import pytest
from PIL import Image

from train.loop import log as logging
from train.loop.log import JsonLog, read_log


@pytest.fixture
def accumulate():
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder):
        events = reader.EventAccumulator(str(folder))
        events.Reload()
        return events

    return read


def test_every_number_reaches_tensorboard_and_a_resumed_run_goes_on(tmp_path, accumulate):
    log = JsonLog(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log(step=step, loss=1 / step)
    log(part="decoder", step=7, psnr=20.0)
    Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).save(tmp_path / "sheet.png")
    log.image("sheet", tmp_path / "sheet.png", 3)
    again = JsonLog(tmp_path / "log.jsonl")  # the first run was killed after a state of step 1
    for step in (2, 3, 4):
        again(step=step, loss=2.0)

    events = accumulate(tmp_path / "tensorboard")
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    assert [(e.step, e.value) for e in accumulate(tmp_path / "tensorboard" / "decoder").Scalars("psnr")] == [(7, 20.0)]
    assert "step" not in events.Tags()["scalars"]
    assert len(read_log(tmp_path / "log.jsonl")) == 7  # the record hides nothing


def test_a_sheet_reaches_tensorboard(tmp_path, accumulate):
    log = JsonLog(tmp_path / "log.jsonl")
    Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).save(tmp_path / "sheet.png")
    log.image("sheet", tmp_path / "sheet.png", 3)
    (image,) = accumulate(tmp_path / "tensorboard").Images("sheet")
    assert (image.step, image.width, image.height) == (3, 6, 4)


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    logging._writer_type.cache_clear()
    try:
        log = JsonLog(tmp_path / "log.jsonl")
        log(step=1, loss=0.5)
        log(step=2, loss=0.25)
        log.image("sheet", tmp_path / "never-read.png", 2)
    finally:
        logging._writer_type.cache_clear()
    assert capsys.readouterr().err.count("TensorBoard is off") == 1
    assert [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0.5, 0.25]
    assert not (tmp_path / "tensorboard").exists()

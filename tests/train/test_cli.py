"""`python -m train`: every stage's help names every option with a default or a reason; a sheet of the world is drawn."""

import argparse
import importlib

import numpy as np
import pytest
from PIL import Image

from train.__main__ import STAGES, main
from train.data.sheet import contact_sheet


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_complete(stage, capsys):
    module = importlib.import_module(STAGES[stage][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    for action in parser._actions:
        assert action.help, (stage, action.dest)
    with pytest.raises(SystemExit) as stop:
        main([stage, "--help"])
    assert stop.value.code == 0
    assert f"python -m train {stage}" in capsys.readouterr().out


def test_unknown_stage_and_recipe(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
    assert "fly" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no recipe 'huge'"):
        main(["encoder", "--config", "huge", "--out", "nowhere"])


@pytest.mark.parametrize("stage", ["encoder", "pretrain"])
def test_a_device_that_is_not_there_is_refused(stage, tmp_path):
    with pytest.raises(ValueError, match="--device: 'tpu', expected 'cpu' or 'cuda'"):
        main([stage, "--device", "tpu", "--out", str(tmp_path / "run")])


def test_world_sheet(tmp_path, capsys):
    path = tmp_path / "world.png"
    size = ["--count", "12", "--boxes", "--size", "64", "96"]
    assert main(["world", "--sheet", str(path), *size, "--captions", "geneval", "--classes", "core"]) == 0
    with Image.open(path) as image:
        short = image.size
    assert short[0] == 10 * 164
    assert short[1] >= 2 * 200  # two rows
    assert main(["world", "--sheet", str(path), *size, "--captions", "dense"]) == 0
    with Image.open(path) as image:  # longer captions, taller rows
        assert image.width == 10 * 164
        assert image.height > short[1]
    contact_sheet([np.zeros((64, 64, 3), np.uint8)] * 3, ["a", "b", "c"], path)
    with Image.open(path) as image:  # no empty columns
        assert image.width == 3 * 164
    assert [p.name for p in tmp_path.iterdir()] == ["world.png"]
    assert "12 scenes" in capsys.readouterr().out

"""`python -m train`: every stage's help names every option with a default or a reason; a sheet of the world is drawn."""

import argparse
import errno
import importlib
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image

from train import __main__ as commands
from train.__main__ import STAGES, main
from train.data.contact_sheet import contact_sheet
from train.loop.clock import Interrupted


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


SCALED = ["pretrain", "--config", "released/pretrain_512", "--dry-run"]
MISTAKES = [  # command, what its one line says
    ([*SCALED, "--set", "LRR=1"], "no field 'LRR'; did you mean LR?"),
    ([*SCALED, "--set", "MODEL={'num_layer': 2}"], "MODEL: no field 'num_layer'; fields: num_layers"),
    ([*SCALED, "--set", "SLOTS=0"], "SLOTS: expected 1 or more, got 0"),
    ([*SCALED, "--set", "LR=-1.0"], "LR: expected a positive number"),
    ([*SCALED, "--set", "MU=((1, 2), (1, 3))"], "MU: expected a number or two points"),
    ([*SCALED, "--set", "SHEET.base=70"], "base_resolution must be one of"),
    ([*SCALED, "--set", "SHEET.steps=0"], "SHEET.steps: expected 1 or more"),
    ([*SCALED, "--set", "ASPECTS=('7:2',)"], "aspect_ratio must lie between"),
    ([*SCALED, "--data", "nowhere"], "nowhere/manifest.json: no finished shards here"),
    ([*SCALED[:-1], "--lora", "r=4"], "--lora: expected --init CHECKPOINT beside it"),
    (["shards", "--images", "nowhere"], "--images: nowhere is no folder"),
    (["shards", "--images", ".", "--captions", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
]


@pytest.mark.parametrize(("words", "told"), MISTAKES, ids=[told.split(":")[0] for _, told in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_two(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", *words])
    assert commands.command() == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--steps", "0"], ["--shard", "0"], ["--world", "0"], ["--mfu", "0"]])
def test_numbers_that_mean_nothing_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*SCALED, *words])
    assert stop.value.code == 2
    assert f"argument {words[0]}: invalid" in capsys.readouterr().err


def test_bugs_keep_their_traceback(monkeypatch, capsys):
    def fails(error):
        def run():
            raise error

        return run

    def divides_by():
        return int("zero")

    for bug in (fails(KeyError("slot")), fails(RuntimeError("torch")), divides_by):
        monkeypatch.setattr(commands, "main", bug)
        with pytest.raises((KeyError, RuntimeError, ValueError)):
            commands.command()
    monkeypatch.setattr(commands, "main", fails(FloatingPointError("the loss is nan")))
    assert commands.command() == 1
    monkeypatch.setattr(commands, "main", fails(KeyboardInterrupt()))
    assert commands.command() == 130
    assert capsys.readouterr().err == "error: the loss is nan\ninterrupted\n"


def test_what_the_machine_refuses_is_one_line_and_exit_code_one(monkeypatch, capsys):
    disk = OSError(errno.ENOSPC, "No space left on device", "runs/a/pretrain.pt")
    for error, said in (
        (disk, "runs/a/pretrain.pt: No space left on device; what was saved before is kept"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk: Quota exceeded; what was saved before is kept"),
        (BrokenProcessPool("terminated"), "a worker process died (killed, or out of memory?); what was saved before"),
        (Interrupted("a.tar: gone,\nasked for member b"), "a.tar: gone, asked for member b\n"),
    ):
        monkeypatch.setattr(commands, "main", lambda error=error: (_ for _ in ()).throw(error))
        assert commands.command() == 1
        told = capsys.readouterr().err
        assert told.startswith(f"error: {said}")
        assert told.count("\n") == 1


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

"""A run of stage "rl" as a user has it: the command repeats to the bit, resumes, ends cleanly, shows itself, and what it exports draws."""

import json
import signal

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lens import LensPipeline
from tests.train.small_rl import PROMPTS, Bright
from train import rl
from train.__main__ import main
from train.loop.checkpoints import Checkpoints
from train.loop.trainer import ALONE
from train.rl_judging import Judging
from train.rl_method import Held

pytestmark = pytest.mark.nightly  # five runs and three pipelines: minutes

FEWEST = [
    "GROUPS=2",
    "GROUP=2",
    "SLOTS=2",
    "SAMPLING_STEPS=2",
    "TIMES=1",
    "BASES=(64,)",
    "DIVERSITY_WEIGHT=0",
    "NEUTRAL=()",
    "WATCH=none",
]
FEWEST += ["LORA=r=2,alpha=4,targets=all", "LR=1e-2", "VALIDATE_EVERY=2", "SAVE_EVERY=2", "KEEP_EVERY=2", "STOP={}"]
FEWEST += ["SHEET.steps=1", "PROMPTS=('a red car',)"]


def bright(*_):
    """In the small world's place: brightness, on prompts that need no detector."""
    held = Held(["a blue heart", "a key"], [PROMPTS[0].rubrics] * 2, [64, 64])
    return Judging(Bright(), "all of it", PROMPTS, held, None, None)


@pytest.fixture(scope="module")
def command():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "judging", bright)
        changes = [word for change in FEWEST for word in ("--set", change)]
        yield lambda out, *more: main(["rl", "--config", "mini", "--out", str(out), *changes, *more])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Five steps, and their export."""
    out = tmp_path_factory.mktemp("rl") / "whole"
    assert command(out, "--steps", "5") == 0
    assert command(out, "--export", str(out / "export")) == 0
    return out


def dcp_tensors(state):
    """name -> tensor of a state of the trainer."""
    path = state.parent.parent / "tensors.pt"
    dcp_to_torch_save(state, path)
    return torch.load(path, weights_only=False)


def rows(out):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["score"]) for row in found if "loss" in row], found


def test_the_first_five_steps_repeat_and_a_resumed_command_ends_cleanly(command, whole, tmp_path):
    for last in (2, 5):
        assert command(tmp_path / "cut", "--steps", str(last)) == 0
    assert rows(tmp_path / "cut")[0] == rows(whole)[0]
    assert [step for step, *_ in rows(whole)[0]] == [1, 2, 3, 4, 5]
    own, other = (dcp_tensors(out / "checkpoints" / "step_0000005") for out in (whole, tmp_path / "cut"))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_the_page_of_a_run_has_its_curves(whole):
    page = (whole / "index.html").read_text()
    for words in (
        "Before and after",
        "held_score",
        "Pass rates by kind of rubric",
        "passed_of_objects",
        "sheet_000005.png",
    ):
        assert words in page, words


def test_adapter_and_merged_weights_draw_the_same(whole):
    call = {"prompt": "a red car", "seed": 3, "num_inference_steps": 2, "output_type": "latent"}

    def pipeline(source):
        return LensPipeline.from_pretrained(source, device="cpu", dtype=torch.bfloat16)

    adapter, base = pipeline(whole / "export" / "lora"), pipeline("mini-base")
    drawn, plain = adapter(**call).images, base(**call).images
    base.load_lora(whole / "export" / "lora")
    assert torch.equal(base(**call).images, drawn)
    assert not torch.equal(plain, drawn)
    assert torch.equal(pipeline(whole / "export")(**call).images, drawn)
    index = json.loads((whole / "export" / "lora" / "model_index.json").read_text())
    assert index["lens"]["rl_steps"] == 5
    assert json.loads((whole / "export" / "lora" / "recipe.json").read_text())["rl"]["STEP"] == 5


def test_an_adapters_folder_starts_no_training(whole, command, tmp_path):
    with pytest.raises(ValueError, match="an adapter's folder; expected a whole model"):
        command(tmp_path, "--init", str(whole / "export" / "lora"))


def test_the_best_state_keeps_its_variety(tmp_path):
    states = Checkpoints(tmp_path / "checkpoints", ALONE)
    for step in (0, 5, 10, 15):
        (tmp_path / "checkpoints" / f"step_{step:07d}").mkdir(parents=True)
    found = [(0, 0.5, 8.0), (5, 0.7, 7.5), (10, 0.8, 7.1), (15, 0.75, 7.3), (20, 0.9, 8.0)]
    lines = [json.dumps({"step": s, "held_score": v, "held_effective_backdrops": d}) for s, v, d in found]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, json.dumps({"step": 5, "loss": 1.0})]) + "\n")
    assert rl.best_of(tmp_path, states).name == "step_0000015"  # 10 is less varied than 0.9 x 8, 20 was not kept

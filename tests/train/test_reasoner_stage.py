"""The stage "reasoner": layers that learn to write, while all that the transformer reads through stays as it is."""

import pytest
import torch

from lens import CheckpointError
from lens.formats.gpt_oss import load_gpt_oss, load_lm_head, load_writer
from lens.formats.safetensors import save_tensors
from lens.gpt_oss import Keys
from tests.train.clocks import StopAfter
from tests.train.golden_losses import SHIPPED
from tests.train.test_resume import assert_same_state, recipe
from train import configs, reasoner
from train.loop.checkpoints import folder_tensors, load_state
from train.networks.text_path import tokenizer_of

ENCODER = configs.load("mini", "encoder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps in one piece, and with a stop after the first."""
    out = tmp_path_factory.mktemp("reasoner")
    only = {"open": 0.0, "elsewhere": 0.0, "unknown": 0.0}  # captions: the others draw all classes of the world
    config = recipe("reasoner", SHARES=only, TRAIN={"batch": 2, "warmup": 1, "decay": 1}, VALIDATION=2)
    for name, stops in (("whole", [4]), ("parts", [1, 4])):
        for stop in stops:
            reasoner.train(config, ENCODER, out / name, SHIPPED, StopAfter(stop), 3)
    reasoner.export(config, out / "whole", out / "model")
    (out / "model" / "text_encoder").symlink_to(SHIPPED / "text_encoder")
    return out


def test_it_resumes_bit_for_bit(trained):
    assert_same_state(trained / "whole" / "reasoner.pt", trained / "parts" / "reasoner.pt", "reasoner")


def test_layers_and_last_norm_learn_and_nothing_else(trained):
    state = load_state(trained / "whole" / "reasoner.pt", "reasoner")
    before = folder_tensors(SHIPPED / "text_encoder")
    changed = {name for name, value in state["model"].items() if not torch.equal(value, before[name])}
    assert (
        changed
        == state["ema"]["average"].keys()
        == {n for n in before if n.startswith(("model.layers.", "model.norm."))}
    )


def test_what_is_exported_writes_as_the_trained_model_does(trained):
    """Logits of the writer, from files, against transformers' with the averaged weights rounded to bfloat16."""
    state = load_state(trained / "whole" / "reasoner.pt", "reasoner")
    theirs = reasoner.build(ENCODER).eval()
    theirs.load_state_dict({**state["model"], **state["ema"]["average"]})
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(p.bfloat16() if name in state["ema"]["average"] else p)
    writer = load_writer(trained / "model" / "text_encoder", torch.float32, "cpu")
    head = load_lm_head(trained / "model" / "text_encoder", writer, "cpu")
    tokens = tokenizer_of(ENCODER.TOKENIZER)
    ids = tokens.prefix + tokens.encode_answer("a birthday", "The picture shows")[0][:-1]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), use_cache=False).logits[0, -1]
    found = writer._logits(writer.norm(writer([ids], [Keys(len(ids))], (3,))[3][-1:]), head)[0]
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert '"reasoner"' in (trained / "model" / "recipe.json").read_text()


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "cut"])
def test_a_damaged_file_is_refused_by_name(trained, tmp_path, fault):
    (tmp_path / "text_encoder").symlink_to(SHIPPED / "text_encoder")
    tensors = folder_tensors(trained / "model" / "reasoner")
    if fault == "missing":
        del tensors["norm.weight"]
    elif fault == "extra":
        tensors["lm_head.weight"] = torch.zeros(2)
    elif fault == "shape":
        tensors["norm.weight"] = torch.zeros(2)
    save_tensors(tmp_path / "reasoner", "model", tensors)
    file = tmp_path / "reasoner" / "model.safetensors"
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"reasoner.model\.safetensors"):
        load_writer(tmp_path / "text_encoder", torch.float32, "cpu")


def test_a_text_encoder_without_one_has_none(tmp_path):
    (tmp_path / "text_encoder").symlink_to(SHIPPED / "text_encoder")
    assert load_writer(tmp_path / "text_encoder", torch.float32, "cpu") is None
    assert load_writer(None, torch.float32, "cpu") is None
    assert load_gpt_oss(tmp_path / "text_encoder", torch.float32, "cpu") is not None

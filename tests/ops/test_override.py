"""What both choices rest on: a forced name lasts for its block, choices are forgotten with it; tables are refused."""

from __future__ import annotations

import contextlib
import json

import pytest

from lens.ops.override import Override, one_of, rates

ENTRY = {"backend": "a", "tflops": 3, "status": "measured", "source": "somewhere"}


def test_a_forced_name_lasts_for_its_block_and_choices_are_forgotten_at_both_ends(monkeypatch):
    monkeypatch.setenv("LENS_TEST_CHOICE", "b")
    override, seen = Override("LENS_TEST_CHOICE", "here", lambda: ["a", "b", "c"]), []
    override.changed = lambda: seen.append(override.name)
    assert override.name == "b"
    with contextlib.suppress(KeyError), override.use("a"), override.use(None):
        raise KeyError
    assert seen == ["a", None, "a", "b"]
    with pytest.raises(ValueError, match=r"^here: name must be one of a, b, c, got 'd'$"), override.use("d"):
        pass
    monkeypatch.setenv("LENS_TEST_CHOICE", "")
    assert Override("LENS_TEST_CHOICE", "here", lambda: []).name is None
    assert one_of(["a", "b"]) == "a or b"


@pytest.mark.parametrize("change", [{"status": "guessed"}, {"source": ""}, {"tflops": 0}, {"backend": "z"}, {}])
def test_an_entry_that_is_no_rate_is_refused(tmp_path, change):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"entries": [ENTRY, {**ENTRY, **change}]}))
    if not change:
        assert rates(path, backend=("a", "b")) == [ENTRY, ENTRY]
    else:
        with pytest.raises(ValueError, match=r"^table.json: a measured or predicted rate with its source expected"):
            rates(path, backend=("a", "b"))

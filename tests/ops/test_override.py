"""What both choices rest on: a forced name lasts for its block, and choices are forgotten with it."""

from __future__ import annotations

import contextlib

import pytest

from lens.ops.override import Override, one_of


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

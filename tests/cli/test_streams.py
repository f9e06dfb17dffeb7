"""What the three commands need for a word of help, and how they end where nobody reads what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lens.cli import terminal, unread

ROOT = Path(__file__).parents[2]
LENS = "from lens.cli import main; main()"
WORDS = {
    "lens --version": [LENS, "--version"],
    "lens --help": [LENS, "--help"],
    "lens generate --help": [LENS, "generate", "--help"],
    "train --help": ["import runpy; runpy.run_module('train', run_name='__main__')", "--help"],
    "bench --help": ["import runpy; runpy.run_module('bench', run_name='__main__')", "--help"],
}


@pytest.mark.parametrize("name", WORDS)
def test_help_does_not_wait_for_torch(name):
    code, *words = WORDS[name]
    watched = f"import sys\ntry:\n    {code}\nfinally:\n    print(sys.modules.keys() & {{'torch', 'diffusers', 'transformers'}})"
    done = subprocess.run([sys.executable, "-c", watched, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *told, loaded = done.stdout.splitlines()
    assert len(" ".join(told)) > 5
    assert loaded == "set()"


@pytest.mark.parametrize("name", ["lens --version", "lens --help", "train --help", "bench --help"])
def test_output_that_nobody_reads_ends_a_command_as_sigpipe_does(name):
    """By Typer's echo, by rich's console, and by what Python writes at its end."""
    reader, writer = os.pipe()
    os.close(reader)
    code, *words = WORDS[name]
    command = [sys.executable, "-c", code, *words]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error():
    def of_a_worker():
        raise BrokenPipeError(32, "Broken pipe")

    def exits():
        sys.exit(3)

    with pytest.raises(BrokenPipeError):
        unread.unread_output_ends(of_a_worker)
    with pytest.raises(SystemExit) as left:
        unread.unread_output_ends(exits)
    assert left.value.code == 3
    assert unread.unread_output_ends(lambda: 2) == 2


def test_a_drawing_leaves_its_broken_pipe_to_the_command():
    """No `error: Broken pipe`, which a full disk would be."""
    with pytest.raises(BrokenPipeError), terminal.clean_exits([]):
        raise BrokenPipeError(32, "Broken pipe")

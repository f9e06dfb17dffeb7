"""Training state on disk: written to a temporary name, flushed, renamed; resumed bit for bit on a CPU.

Two kinds, with the same calls. `StateFile` is one file and serves trainings of one process. `Checkpoints` keeps the states of
a training of any number of processes, OUT/checkpoints/step_0001000 and so on, written beside the training by PyTorch's
distributed checkpointing; a state can be loaded by another number of processes than wrote it:

    __0_0.distcp ...    the tensors, a file per process
    .metadata           PyTorch's table of them (a pickle: load what you trust)
    state.json          everything else: step, place in the data, settings, revision
    checksums.json      SHA-256 of every file above

A folder gets its name when all of it is on disk, and only then `latest` names it. All processes see one file system. state.json
also names the state before it: a branch is a state with all that it came from, however many were begun from older ones.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lens.arguments import shortened
from lens.formats.files import CheckpointError, read_json, write_atomic, write_json
from lens.formats.safetensors import open_shards

from .clock import Interrupted
from .ranks import Ranks

FORMAT = 1
Found = TypeVar("Found")
_STATE = re.compile(r"step_[0-9]{1,18}")
RENAMED = {"eye": "detector"}  # stages and their networks by the names that older states have


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, containers of them) so that `path` is never half a file."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # a file, not a path: torch.save would store the temporary's name inside
            torch.save({"format": FORMAT, **state}, file)

    write_atomic(path, write)


def load_state(path: Path, expect: str) -> dict[str, Any]:
    """Read what `save_state` wrote. Errors: missing file, no or half a state file, another stage's file, another format."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no training state here; `python -m train {expect.split()[0]}` writes one")
    try:
        archive = zipfile.is_zipfile(path)  # whose table comes last, so half a file is none
    except zipfile.BadZipFile:
        archive = False
    if not archive:
        raise ValueError(f"{path}: not a training state, or only the first part of one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's own, of a table that is whole and what it speaks of is not
        # not its words, which advise to read what could run any code
        raise ValueError(f"{path}: not a training state that can be read: {type(error).__name__}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected the training state of {expect!r}")
    if isinstance(state.get("stage"), str) and state["stage"] in RENAMED:
        state["stage"] = RENAMED[state["stage"]]
        if isinstance(updates := state.get("ema_updates"), dict):
            state["ema_updates"] = {RENAMED.get(name, name): count for name, count in updates.items()}
    if state.get("format") != FORMAT or state.get("stage") != expect:
        raise ValueError(
            f"{path}: stage {state.get('stage')!r} format {state.get('format')!r}, expected {expect!r} format {FORMAT}"
        )
    return state


class StateFile:
    """The state of a training of one process: {"model": {name: tensor}, "ema": {"average": {...}}, "optimizer": {key: {...}}} and
    what is no tensor, in one file that the next save replaces."""

    failed = False  # a save that fails raises at once

    def __init__(self, path: Path):
        self.path = path

    def take_over(self) -> None:
        """A killed save left a temporary file at most, which no name points to."""

    def wait(self) -> None:
        """Every save is whole when it returns."""

    def latest(self) -> Path | None:
        return self.path if self.path.is_file() else None

    def go_on_from(self, where: Path) -> bool:
        """Whether that state is the one that the next save replaces."""
        return where == self.path

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """tensors: "model.NAME", "ema.NAME", "optimizer.KEY.NAME"."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
        optimizer: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, own = name.partition(".")
            if kind == "optimizer":
                key, _, own = own.partition(".")
                optimizer.setdefault(key, {})[own] = value
            else:
                parts[kind][own] = value
        save_state(
            self.path,
            {"step": step, **about, "model": parts["model"], "ema": {"average": parts["ema"]}, "optimizer": optimizer},
        )

    def load(self, where: Path, tensors: Mapping[str, Tensor], expect: str) -> dict[str, Any]:
        """Fill `tensors` from a state file of stage `expect`; returns what is no tensor of a network.

        Errors: those of `load_state`; ValueError for tensors that are missing or of another shape.
        """
        state = load_state(where, expect)
        try:
            optimizer, average = state.pop("optimizer"), state.pop("ema")
            stored = {f"model.{n}": v for n, v in state.pop("model").items()}
            stored |= {f"ema.{n}": v for n, v in average["average"].items()}
            named = {} if "param_groups" in optimizer else {key: dict(own) for key, own in optimizer.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{where}: a state without tensors of a model, an average and an optimizer: {error!r}"
            ) from None
        if "param_groups" in optimizer:  # as torch numbers them, in files of before the moments had names
            order = dict.fromkeys(n.split(".", 2)[2] for n in tensors if n.startswith("optimizer."))
            for place, name in enumerate(order):
                for key, value in optimizer["state"].get(place, {}).items():
                    stored[f"optimizer.{key}.{name}"] = value
            stored = {n: torch.zeros_like(v) for n, v in tensors.items() if n.startswith("optimizer.")} | stored
            state["ema_updates"] = average["updates"]
        else:
            stored |= {f"optimizer.{key}.{n}": v for key, own in named.items() for n, v in own.items()}
        _refuse(_unlike(where, tensors, {name: getattr(value, "shape", ()) for name, value in stored.items()}))
        _refuse(
            [
                f"{where}: {n} is a {type(stored[n]).__name__}, expected a tensor"
                for n in tensors
                if not isinstance(stored[n], Tensor)
            ]
        )
        for name, value in tensors.items():
            value.copy_(stored[name])
        return state


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a released-layout folder (`transformer/`, `vae/`, ...), floats as float32. Errors as in loading."""
    out: dict[str, torch.Tensor] = {}
    for key, shard in open_shards(folder).items():

        def take(value: torch.Tensor, key: str = key) -> None:
            out[key] = value.float() if value.is_floating_point() else value.clone()

        shard.read(key, take)
    return out


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary name."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


# ------------------------------------------------------------------------------------------------ many processes


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _flush(folder: Path) -> None:
    """The names in a folder, too, are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Writer(dcp.FileSystemWriter):
    """Writes into a folder of a temporary name. The coordinator publishes it when every process has written its part."""

    def __init__(self, owner: Checkpoints, name: str, state: dict[str, Any]):
        self.owner, self.name, self.state = owner, name, state
        super().__init__(owner.folder / f".{name}.part")

    def write_data(self, plan: Any, planner: Any) -> Any:
        with self._said():
            written = super().write_data(plan, planner)
            for name in {result.storage_data.relative_path for result in written.wait()}:
                (Path(self.path) / f"{name}.sha256").write_text(_sha256(Path(self.path) / name))
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        with self._said():
            super().finish(metadata, results)
            folder = Path(self.path)
            write_json(folder / "state.json", {**self.state, "parent": self.owner.parent})
            sums = {}
            for part in sorted(folder.glob("*.sha256")):
                sums[part.stem] = part.read_text()
                part.unlink()
            sums |= {name: _sha256(folder / name) for name in (".metadata", "state.json")}
            write_json(folder / "checksums.json", sums)
            self.owner.publish(folder, self.name)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What the system refused, in words that reach every process: torch's writer makes another error of a full disk."""
        try:
            yield
        except Exception as error:
            found: BaseException | None = error
            while found is not None and not isinstance(found, OSError):
                found = found.__cause__ or found.__context__
            if found is None:
                raise
            raise Interrupted(f"{self.owner.folder / self.name}: not saved, {found.strerror}") from error


class Damaged(ValueError):
    """A state whose files are not those that were saved, or not all there."""


class Checkpoints:
    """States of a training. `save` returns when the tensors are copied to host memory; a thread writes them.

    keep_last: how many of the branch that is trained stay; keep_every: those of multiples of this step stay for good (0: none).
    States of an abandoned branch go when this one has come as far.
    """

    def __init__(self, folder: Path, group: Ranks, keep_last: int = 2, keep_every: int = 0):
        if keep_last < 1:
            raise ValueError(f"Checkpoints: keep_last must be positive, got {keep_last}")
        self.folder, self.group, self.keep_last, self.keep_every = folder, group, keep_last, keep_every
        self.pending: Future | None = None
        self.parent = ""  # the state that the next one comes from
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # alone is as good as any

    def take_over(self) -> None:
        """Clear away what a killed save left. For the training that writes here alone: others would remove its save under way."""
        self.clear()
        self.group.barrier()

    def clear(self) -> None:
        """Remove what is no whole state."""
        if self.group.main and self.folder.is_dir():
            for part in self.folder.glob(".step_*.part"):
                shutil.rmtree(part)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write a state; waits for the one before. Errors: those of the save before, on all processes, see `wait`."""
        self.wait()
        name = f"step_{step:07d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"format": FORMAT, "step": step, "world": self.group.world, **state}
        pending = dcp.async_save(
            dict(tensors),
            storage_writer=_Writer(self, name, whole),
            process_group=self.group.writers,
            no_dist=self.group.world == 1,
        )
        assert isinstance(pending, Future), "by threads, as is the default, one future stands for all of it"
        self.pending = pending

    @property
    def failed(self) -> bool:
        """Whether the save under way has ended in an error; `wait` raises it."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Until the save under way is published, and readable on every process. Errors: Interrupted where the system refused it."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            try:
                pending.result()
            except CheckpointException as error:  # torch's, no Exception
                said = [own for own, _ in error.failures.values() if isinstance(own, Interrupted | OSError)]
                if not said:
                    raise
                self.clear()
                latest = self.latest()
                raise Interrupted(f"{said[0]}; the latest state is {latest.name if latest else 'none'}") from error
            self.group.barrier()

    def publish(self, part: Path, name: str) -> None:
        """Give a whole folder its name, point `latest` to it, remove what need not be kept."""
        _flush(part)
        if (self.folder / name).is_dir():  # of a branch that was left: `latest` points to where this one began
            os.replace(self.folder / name, self.folder / f".{name}.old.part")
        os.replace(part, self.folder / name)
        _flush(self.folder)
        write_text(self.folder / "latest", name + "\n")
        _flush(self.folder)
        shutil.rmtree(self.folder / f".{name}.old.part", ignore_errors=True)
        self.parent = name
        kept = [state for state in self.branch() if _has_its_files(state)][: self.keep_last]
        for old in self.states():
            ahead = step_of(old) > step_of(self.folder / name)
            if not (old in kept or ahead or (self.keep_every and step_of(old) % self.keep_every == 0)):
                shutil.rmtree(old)

    def states(self) -> list[Path]:
        """All that were published and not removed, of whatever branch, the highest step first."""
        found = [path for path in self.folder.glob("step_*") if _STATE.fullmatch(path.name)]
        return sorted(found, key=step_of, reverse=True)

    def _named(self) -> str:
        """What `latest` names; "" where there is none. One that is damaged names no state, but is not passed over in silence."""
        pointer = self.folder / "latest"
        return pointer.read_bytes().decode("utf-8", "replace").strip() if pointer.is_file() else ""

    def branch(self) -> list[Path]:
        """The state that `latest` names and those that it came from, newest first; [] where there is none.

        One that is not there any more is passed over; where none is named, the next lower step stands for it.
        """
        there = self.states()
        pointed = self._named()
        place = self.folder / pointed if _STATE.fullmatch(pointed) else None
        at, found = place if place is not None else next(iter(there), None), []
        while at is not None:
            if at in there:
                found.append(at)
            below = [state for state in there if step_of(state) < step_of(at)]
            named = at.parent / _parent_of(at)
            at = named if named in below else next(iter(below), None)
        return found or there[:1]

    def latest(self) -> Path | None:
        """The newest state of the branch that has all its files, or None where there is no state yet."""
        branch = self.branch()
        return next((state for state in branch if _has_its_files(state)), branch[0] if branch else None)

    def last_whole(self, forced: Path | None, take: Callable[[Path], Found], say: Callable[[str], None]) -> Found:
        """`take` of the newest state of the branch that is whole; of a `forced` one, of that alone.

        say: told of every state that is passed over, and why. Errors: Damaged where none is whole; those of `take`.
        """
        named = self._named()
        candidates = [forced] if forced is not None else self.branch()
        if forced is None and named and not (_STATE.fullmatch(named) and (self.folder / named).is_dir()):
            say(f"{self.folder / shortened(named)[1:-1]}: the newest state is missing")
        for place, state in enumerate(candidates):
            try:
                found = take(state)
            except Damaged as error:
                if place + 1 == len(candidates):
                    raise
                say(f"{error}; going back to {candidates[place + 1].name}")
                continue
            return found
        raise Damaged(f"{self.folder}: no state of a training here")

    def load(self, folder: Path, tensors: Mapping[str, Tensor], expect: str | None = None) -> dict[str, Any]:
        """Fill `tensors`, sharded as they are, from a state; returns what is not a tensor (see `read_state`).

        Errors: ValueError on all processes for the state of a stage other than `expect`, for a damaged file (each checks its
        share), for tensors that are missing or of another shape.
        """
        try:
            state, sums = read_state(folder), read_json(folder / "checksums.json")
        except (FileNotFoundError, CheckpointError) as error:
            raise Damaged(str(error)) from error
        if expect is not None and state.get("stage") != expect:
            raise ValueError(
                f"{folder}: a state of stage {state.get('stage')!r}, expected {expect!r}; --init takes its weights"
            )
        mine = sorted(sums)[self.group.rank :: self.group.world]
        damaged = [f"{folder / n}: not the file that was saved" for n in mine if not _intact(folder / n, sums[n])]
        _refuse([line for own in self.group.gather(damaged) for line in own], Damaged)
        reader = dcp.FileSystemReader(folder)
        try:
            held = reader.read_metadata().state_dict_metadata
        except Exception as error:  # whatever a pickle of PyTorch's raises where it is none
            raise Damaged(f"{folder / '.metadata'}: not PyTorch's table of a state: {error!r}") from error
        stored = {name: found.size for name, found in held.items() if isinstance(found, TensorStorageMetadata)}
        _refuse(_unlike(folder, tensors, stored))
        try:
            dcp.load(
                dict(tensors),
                storage_reader=reader,
                process_group=self.group.writers,
                no_dist=self.group.world == 1,
            )
        except CheckpointException as error:  # on all processes
            first = next(iter(error.failures.values()), (error,))[0]
            raise Damaged(f"{folder}: the tensors cannot be read: {first!r}") from error
        return state

    def go_on_from(self, folder: Path) -> bool:
        """A state of this folder is the latest from now on: an older one begins a new branch. Returns whether it is of it."""
        own = folder.parent == self.folder
        if self.group.main and own:
            write_text(self.folder / "latest", folder.name + "\n")
        self.parent = folder.name if own else ""
        self.group.barrier()
        return own


def step_of(folder: Path) -> int:
    """Of a state's folder, by its name."""
    return int(folder.name.removeprefix("step_"))


def _parent_of(folder: Path) -> str:
    """The name of the state that a state came from; "" where it names none."""
    try:
        return str(read_state(folder).get("parent", ""))
    except (OSError, ValueError):
        return ""


def _has_its_files(folder: Path) -> bool:
    """Whether the files of a state are all there and the small ones what was saved: quick, where hashing the tensors is not."""
    try:
        sums = read_json(folder / "checksums.json")
        small = all(_intact(folder / name, sums[name]) for name in (".metadata", "state.json"))
        return small and all((folder / name).is_file() for name in sums)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a state. Errors: FileNotFoundError, or ValueError where another format or only part of one is there."""
    path = folder / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no state of a training here, or only the first part of one")
    state = read_json(path)
    if type(state.get("step")) is not int:
        raise CheckpointError(f"{path}: step must be an integer, got {str(state.get('step'))[:80]!r}")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: format {state.get('format')!r}, expected {FORMAT}")
    return state


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path) == sha256


def _unlike(where: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> list[str]:
    """What of `tensors` a state lacks or has in another shape. stored: name -> shape."""
    wrong = [f"{where}: no tensor {name}" for name in tensors if name not in stored]
    return wrong + [
        f"{where}: {name} has shape {list(stored[name])}, expected {list(value.shape)}"
        for name, value in tensors.items()
        if name in stored and stored[name] != value.shape
    ]


def _refuse(lines: Sequence[str], kind: type[ValueError] = ValueError) -> None:
    if lines:
        more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        raise kind("; ".join(lines[:4]) + more)

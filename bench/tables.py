"""Committed results into what chooses kernels: the ORDERS of lens/ops/{attention,linear}/choice.py, invariance_table.json.

An order is rewritten where results timed its names: those take the places that timed names hold, the fastest first; a new
name comes before the first that it beats; names that nothing timed stay where they are. The line ends with the results it
rests on; where several time one name, the last one given counts. A price of batch invariance is the best time under it
over the best time without, less 1, of a case in which nothing was forced and measured orders chose.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lens.engine import batch_invariance
from lens.formats.files import write_atomic
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.choice import BACKWARDS, CANDIDATES, Choice
from lens.ops.linear import choice as linear_choice

from .case import OURS
from .machine import ROOT
from .report import RESULTS, put
from .result import NoResult, Result, load
from .suites.step import INVARIANT

ATTENTION, LINEAR = Path(attention_choice.__file__), Path(linear_choice.__file__)
BEGIN, END = "    # orders: begin\n", "    # orders: end\n"
# the case that stands for each use of attention; gradients are a part of training
CASES = {
    "attention/4511,4096/bf16/forward": "long",
    "attention/8x968/bf16/forward": "short",
    "attention/4511,4096/bf16/training": "long training",
    "attention/8x968/bf16/training": "short training",
    "attention/4511,4096/bf16/gradients": "long gradients",
    "attention/8x968/bf16/gradients": "short gradients",
}
INVARIANCE = ("arch", "case")
Entry = dict[str, Any]
Key = tuple[str, str]  # architecture, use
Order = tuple[str, ...]
Timed = dict[str, tuple[float, str]]  # name -> seconds, where they were measured


def source(result: Result, folder: Path) -> str:
    """Device, file and commit of a result."""
    path = result.path.resolve()
    file = path.relative_to(folder) if path.is_relative_to(folder) else path.name
    return f"{result.identity['device']}, {file}, commit {result.build['commit']}"


# ------------------------------------------------------------------------------------------------ what was timed


def attention_times(results: Iterable[Result], folder: Path = ROOT) -> dict[Key, Timed]:
    """Of every use: candidates by their forward pass; for training, candidates and pairs by both passes."""
    cases: dict[Key, Timed] = {}
    for result in results:
        for (case, subject), row in result.rows.items():
            if case in CASES:
                timed = cases.setdefault((result.identity["capability"], CASES[case]), {})
                timed[subject] = row.best, source(result, folder)
    found: dict[Key, Timed] = {}
    for (arch, use), timed in cases.items():
        if use in ("long", "short"):
            found[arch, use] = {c.name: timed[c.name] for c in CANDIDATES if c.name in timed}
        elif use.endswith("training"):
            gradients = cases.get((arch, use.replace("training", "gradients")), {})
            found[arch, use] = both_passes(timed, gradients)
    return found


def both_passes(forward: Timed, gradients: Timed) -> Timed:
    """Candidates with their own gradients, and pairs that are faster than both of their libraries by themselves.
    Nondeterministic gradients are left out."""

    def time(choice: Choice) -> tuple[float, str]:
        (a, first), (b, second) = forward[choice.name], gradients[choice.gradients]
        return a + b, first if first == second else f"{first}; {second}"

    timed = [c for c in CANDIDATES if c.name in forward]
    able = {b.name for b in BACKWARDS if b.deterministic and b.name in gradients}
    own = {c.name: time(c) for c in map(Choice, timed) if c.forward.backward and c.gradients in able}
    found = dict(own)
    for pair in (Choice(c, b) for c in timed for b in BACKWARDS if c.gives_lse and b.name in able):
        alone = [own[c.name] for c in map(Choice, timed) if c.name in own and {c.name, c.gradients} & {*names_of(pair)}]
        if all(time(pair)[0] < seconds for seconds, _ in alone):
            found[" + ".join(names_of(pair))] = time(pair)
    return found


def names_of(choice: Choice) -> tuple[str, str]:
    """Of the forward pass and of the gradients."""
    return choice.name, choice.gradients


def linear_times(results: Iterable[Result], folder: Path = ROOT) -> dict[Key, Timed]:
    """Of every GEMM as a block calls it (with the norm that follows): "fused" at the number of rows, ROWS or more, where
    it does worst beside the library."""
    cases: dict[tuple[str, str, int], Timed] = {}
    for result in results:
        for (case, subject), row in result.rows.items():
            counts = case.startswith("gemm/") and row.more.get("block") and row.more["rows"] >= linear_choice.ROWS
            if counts and subject in linear_choice.BACKENDS:
                key = result.identity["capability"], row.more["gemm"], row.more["rows"]
                cases.setdefault(key, {})[subject] = row.best, source(result, folder)
    both = {key: timed for key, timed in cases.items() if len(timed) == len(linear_choice.BACKENDS)}
    worst: dict[Key, Timed] = {}
    for (arch, gemm, _), timed in sorted(both.items(), key=lambda item: item[1]["fused"][0] / item[1]["library"][0]):
        worst[arch, gemm] = timed
    return worst


def invariance_entries(result: Result, folder: Path = ROOT) -> list[Entry]:
    """The price at every case that decides the default, where both subjects ran, ours multiplied, nothing was forced
    and the step without chose its GEMMs by measured orders: beside the library alone invariance could look cheap."""
    found = []
    for case in batch_invariance.CASES:
        plain, invariant = result.rows.get((case, OURS)), result.rows.get((case, INVARIANT))
        if plain is None or invariant is None or invariant.more["gemms"] != "ours":
            continue
        if plain.more["by_measured_orders"] and not plain.more["forced"] and not invariant.more["forced"]:
            key = {"arch": result.identity["capability"], "case": case}
            price = round(invariant.best / plain.best - 1, 4)
            said = {"status": "measured", "source": f"{case}, {source(result, folder)}"}
            found.append({**key, "price": price, **said})
    return found


# ------------------------------------------------------------------------------------------------ what is written


def ranked(order: Order, timed: Timed) -> Order:
    """The order with the timed names, the fastest first, in the places of those it has; new ones before what they beat."""
    fastest = sorted(timed, key=lambda name: timed[name][0])
    places = iter(name for name in fastest if name in order)
    found = [next(places) if name in timed else name for name in order]
    for name in fastest:
        if name not in found:
            slower = (i for i, other in enumerate(found) if other in timed and timed[other][0] > timed[name][0])
            found.insert(next(slower, len(found)), name)
    return tuple(found)


def orders_in(text: str) -> dict[Key, Order]:
    """ORDERS of a choice.py, by its text."""
    orders: dict[Key, Order] = ast.literal_eval("{" + text.partition(BEGIN)[2].partition(END)[0] + "}")
    return orders


def with_orders(text: str, times: dict[Key, Timed]) -> str:
    """The text of a choice.py with the orders that `times` make of those it holds."""
    orders = orders_in(text)
    before, begin, rest = text.partition(BEGIN)
    block, end, after = rest.partition(END)
    lines = block.splitlines(keepends=True)
    for (arch, use), timed in times.items():
        keys = (arch, use), (f"{arch.partition('.')[0]}.0", use), ("8.0", use)
        order = ranked(next((orders[key] for key in keys if key in orders), ()), timed)
        start, said = f'    ("{arch}", "{use}"): ', "; ".join(sorted({where for _, where in timed.values()}))
        names = ", ".join(f'"{name}"' for name in order) + "," * (len(order) == 1)
        at = next((i for i, line in enumerate(lines) if line.startswith(start)), len(lines))
        lines[at : at + 1] = [f"{start}({names}),  # {said}\n"]
    return f"{before}{begin}{''.join(lines)}{end}{after}"


def unproven(text: str, times: dict[Key, Timed]) -> list[str]:
    """What a choice.py's orders hold without a result: our own kernels and pairs, which enter by one alone."""
    own = {c.name for c in CANDIDATES if c.kernel} | {"fused"}
    orders = orders_in(text).items()
    names = [(key, name) for key, order in orders for name in order if name in own or " + " in name]
    return [f"{name} in the order {key}" for key, name in names if name not in times.get(key, {})]


def merged(table: list[Entry], measured: Iterable[Entry], keys: tuple[str, ...]) -> list[Entry]:
    """The table with the measured lines: each in its place, a new one at the end."""
    lines = list(table)
    for entry in measured:
        key = tuple(entry[k] for k in keys)
        at = next((i for i, line in enumerate(lines) if tuple(line[k] for k in keys) == key), len(lines))
        lines[at : at + 1] = [entry]
    return lines


def written(value: dict[str, Any]) -> str:
    """A table as text: one line for each entry."""
    lines = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in value["entries"])
    return f'{{\n  "about": {json.dumps(value["about"], ensure_ascii=False)},\n  "entries": [\n{lines}\n  ]\n}}\n'


def committed_results(folder: Path = RESULTS) -> list[Path]:
    """Results of GPUs under bench/results, by name."""
    paths = [path for path in sorted(folder.glob("*/*.json")) if not path.name.startswith("summary")]
    return [path for path in paths if "capability" in load(path).identity]


def tables(
    results: list[Path],
    check: bool = False,
    attention: Path = ATTENTION,
    linear: Path = LINEAR,
    invariance: Path = batch_invariance.TABLE,
    folder: Path = ROOT,
) -> list[Path]:
    """Write the orders and the prices; the changed files. check: change nothing, ValueError where one is stale or holds
    what needs a result and has none. NoResult for a file that is none, or was not measured on a CUDA device."""
    loaded = [load(path) for path in results]
    for result in loaded:
        if "capability" not in result.identity:
            raise NoResult(f"{result.path}: measured on {result.identity.get('device')}, and the orders are of GPUs")
    wanted: dict[Path, str] = {}
    for path, times in ((attention, attention_times(loaded, folder)), (linear, linear_times(loaded, folder))):
        text = path.read_text(encoding="utf-8")
        if check and (without := unproven(text, times)):
            raise ValueError(f"{path}: without a committed result: {', '.join(without)}")
        wanted[path] = with_orders(text, times)
    table = json.loads(invariance.read_text(encoding="utf-8"))
    prices = [entry for result in loaded for entry in invariance_entries(result, folder)]
    wanted[invariance] = written({**table, "entries": merged(table["entries"], prices, INVARIANCE)})
    changed = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    if check and changed:
        raise ValueError(f"stale: {', '.join(map(str, changed))}; run python -m bench tables")
    for path in [] if check else changed:
        write_atomic(path, partial(put, wanted[path]))
    return changed

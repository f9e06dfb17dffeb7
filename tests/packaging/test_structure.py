"""Arrows of the import graph: no circles, lens below bench and train, train beside no bench, lens/ops below all of lens.

Every import counts, those inside functions too; those under TYPE_CHECKING, which never run, do not, but of lens/ops they
do as well: the seam names nothing above it.
"""

from __future__ import annotations

import ast
import functools
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("lens", "bench", "train")

Graph = dict[str, set[str]]


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for path in (p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, typing: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement, at whatever depth; typing: those under TYPE_CHECKING as well."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            yield from imports(ast.Module(node.orelse, []), typing)
        else:
            yield from imports(node, typing)


def targets(name: str, package: bool, node: ast.Import | ast.ImportFrom, known: dict[str, pathlib.Path]) -> set[str]:
    """The modules of ours that one statement in module ``name`` names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        here = name.split(".") if package else name.split(".")[:-1]
        base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
        base = base if node.level else str(node.module)
        names = [full if (full := f"{base}.{alias.name}") in known else base for alias in node.names]
    return {n for n in names if n in known}


def graph(known: dict[str, pathlib.Path], typing: bool = False, of: str = "") -> Graph:
    """of: what begins the names of the modules to read."""
    made: Graph = {}
    for name, path in ((n, p) for n, p in known.items() if n.startswith(of)):
        tree, package = ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py"
        made[name] = {t for node in imports(tree, typing) for t in targets(name, package, node, known)} - {name}
    return made


@functools.cache
def whole() -> Graph:
    return graph(modules())


def circles(arrows: Graph) -> set[tuple[str, ...]]:
    """Sets of modules that reach one another, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[tuple[str, ...]] = set()

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in arrows[name]:
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            cut = stack.index(name)
            if len(stack) - cut > 1:
                found.add(tuple(sorted(stack[cut:])))
            del stack[cut:]

    for name in arrows:
        if name not in index:
            visit(name)
    return found


def test_no_circles():
    assert circles(whole()) == set()


def test_arrows_point_down():
    below = {"lens": {"lens"}, "train": {"lens", "train"}, "bench": {"lens", "train", "bench"}}
    up = [
        f"{name} -> {target}"
        for name, arrows in whole().items()
        for target in sorted(arrows)
        if target.split(".")[0] not in below[name.split(".")[0]]
    ]
    assert up == []


def test_ops_are_a_leaf():
    """`lens._C`, which is no Python, is all they know of lens."""
    seam = graph(modules(), typing=True, of="lens.ops")
    assert len(seam) > 10
    up = [f"{n} -> {t}" for n, arrows in seam.items() for t in sorted(arrows) if not f"{t}.".startswith("lens.ops.")]
    assert up == []


def test_the_graph_sees_every_way_to_import():
    """What the tests above rest on, on a small tree of its own."""
    code = "\n".join(
        [
            "import lens.config",
            "from . import model, __version__",
            "from .ops import backend",
            "if TYPE_CHECKING:",
            "    from .pipeline import LensPipeline",
            "else:",
            "    from . import rope",
            "def f():",
            "    from train import loop",
        ]
    )
    known = dict.fromkeys(
        ["lens", "lens.config", "lens.model", "lens.ops", "lens.ops.backend", "lens.pipeline", "lens.rope"],
        pathlib.Path(),
    ) | {"train.loop": pathlib.Path()}
    tree = ast.parse(code)
    seen = {t for node in imports(tree, False) for t in targets("lens.vae", False, node, known)}
    assert seen == {"lens", "lens.config", "lens.model", "lens.ops.backend", "lens.rope", "train.loop"}
    assert "lens.pipeline" in {t for node in imports(tree, True) for t in targets("lens.vae", False, node, known)}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}) == {("a", "b", "c")}

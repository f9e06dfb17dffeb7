"""chat_template.jinja -> text. A template is a program that somebody else wrote: it runs in jinja2's sandbox, and bounded.

The sandbox keeps a template from reaching Python, not from running for ever or filling the memory. So three things are
bounded: its length, the steps it takes (calls, operators, rounds of loops, elements of what it builds) and the characters
it prints; and only those filters and methods are known that chat templates use and whose work these bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lens.formats.files import CheckpointError

MOST_CHARACTERS = 1 << 17  # of a template, and of every text in it; the longest templates that people use have 20,000
MOST_PRINTED = 1 << 18  # characters, those of macros and blocks counted where they are printed, too
MOST_STEPS = 20_000
_FILTERS = ("abs", "bool", "capitalize", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list", "lower",
            "safe", "title", "trim", "upper")  # fmt: skip
_METHODS = (
    "capitalize", "count", "endswith", "find", "get", "index", "isalpha", "isdigit", "items", "join", "keys", "lower", "lstrip",
    "replace", "rfind", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper", "values",
)  # fmt: skip
_OPERATORS = frozenset(("+", "-", "*", "/", "//", "%", "**"))


def render(source: str, where: str, values: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> str:
    """The text of a template, or CheckpointError naming ``where``."""
    if len(source) > MOST_CHARACTERS:
        raise CheckpointError(f"{where}: a template of {len(source)} characters, expected at most {MOST_CHARACTERS}")
    try:
        return str(_environment()(functions).from_string(source).render(**values))
    except Exception as error:  # a program may fail in any way
        raise CheckpointError(f"{where}: cannot be rendered: {error!r}") from error


@functools.cache
def _environment() -> Any:
    """The class of the bounded sandbox; jinja2 is imported when the first template is rendered."""
    from jinja2 import Undefined, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import htmlsafe_json_dumps
    from jinja2.visitor import NodeTransformer

    def call(function: str, *arguments: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.Name(function, "load"), list(arguments), [], None, None)

    class Counted(NodeTransformer):
        """Loops, `~`, lists and plain text go through the functions that count."""

        def inner(self, node: Any) -> Any:
            return self.generic_visit(node)

        def visit_For(self, node: Any) -> nodes.For:
            if node.recursive:
                raise SecurityError("a recursive loop")
            node = self.inner(node)
            node.iter = call("lens_rounds", node.iter)
            return node

        def visit_Concat(self, node: Any) -> nodes.Call:
            return call("lens_joined", *self.inner(node).nodes)

        def visit_List(self, node: Any) -> nodes.Call:
            return call("lens_measured", self.inner(node))

        def visit_Dict(self, node: Any) -> nodes.Call:
            return call("lens_measured", self.inner(node))

        def visit_Tuple(self, node: Any) -> nodes.Expr:
            node = self.inner(node)
            return node if node.ctx == "store" else call("lens_measured", node)

        def visit_TemplateData(self, node: Any) -> nodes.Call:
            return call("lens_joined", nodes.Const(node.data))

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = _OPERATORS

        def __init__(self, functions: Mapping[str, Callable[..., Any]]):
            super().__init__(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=self.printed
            )
            self.steps = self.characters = 0
            self.globals = {
                "namespace": self.globals["namespace"],
                "range": self.numbers,
                "raise_exception": self.refuse,
            }
            self.globals |= {"lens_rounds": self.rounds, "lens_joined": self.joined, "lens_measured": self.measured}
            self.globals |= functions
            self.filters = {name: self.bounded(self.filters[name]) for name in _FILTERS if name in self.filters}
            self.filters |= {
                "replace": self.replaced,
                "join": self.joined_by,
                "string": self.as_text,
                "tojson": self.as_json,
            }

        # bounds

        def step(self, count: int = 1) -> None:
            self.steps += count
            if self.steps > MOST_STEPS:
                raise SecurityError(f"more than {MOST_STEPS} steps")

        def fits(self, characters: int) -> None:
            if characters > MOST_CHARACTERS:
                raise SecurityError(f"a text of {characters} characters, expected at most {MOST_CHARACTERS}")

        def measured(self, value: Any, depth: int = 0) -> Any:
            """The value, whose elements, however deep, are steps."""
            if isinstance(value, str | bytes):
                self.fits(len(value))
            elif isinstance(value, list | tuple | dict | range):
                self.step(len(value))
                if depth > 20:
                    raise SecurityError("lists nested too deep")
                if not isinstance(value, range):
                    for element in value.values() if isinstance(value, dict) else value:
                        self.measured(element, depth + 1)
            return value

        def bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
            """A filter that makes no more than it is given."""

            @functools.wraps(function)
            def measured(*args: Any, **kwargs: Any) -> Any:
                self.step()
                for value in args:
                    self.measured(value)
                return function(*args, **kwargs)

            return measured

        def printed(self, value: Any) -> Any:
            if not isinstance(value, Undefined):
                value = self.as_text(value)
                self.characters += len(value)
            if self.characters > MOST_PRINTED:
                raise SecurityError(f"more than {MOST_PRINTED} characters printed")
            return value

        # what templates call

        def refuse(self, message: str) -> None:
            raise TemplateError(message)

        def numbers(self, *limits: int) -> range:
            values = range(*limits)
            if len(values) > MOST_STEPS:
                raise SecurityError(f"a range of {len(values)}, expected at most {MOST_STEPS}")
            return values

        def rounds(self, values: Iterable[Any]) -> list[Any]:
            kept = []
            for value in values:
                self.step()
                kept.append(value)
            return kept

        def as_text(self, value: Any) -> str:
            if not isinstance(value, str | int | float | list | tuple | dict | Undefined | None):
                raise SecurityError(f"a {type(value).__name__} as text")
            text = str(self.measured(value))
            self.fits(len(text))
            return text

        def as_json(self, value: Any, indent: int | None = None) -> Any:
            if not (indent is None or (isinstance(indent, int) and 0 <= indent <= 16)):
                raise SecurityError("tojson with an indent that is none of 0 to 16")
            text = htmlsafe_json_dumps(self.measured(value), sort_keys=True, indent=indent)
            self.fits(len(text))
            return text

        def joined(self, *values: Any) -> str:
            return self.joined_by(values)

        def joined_by(self, values: Iterable[Any], between: str = "") -> str:
            pieces = [self.as_text(value) for value in self.rounds(values)]
            self.fits(sum(map(len, pieces)) + len(between) * max(0, len(pieces) - 1))
            return str(between).join(pieces)

        def replaced(self, text: Any, old: str, new: str, count: int = -1) -> str:
            text, old, new = self.as_text(text), str(old), str(new)
            self.fits(len(text) + text.count(old) * max(0, len(new) - len(old)))
            return text.replace(old, new, count)

        # what jinja2 asks before it acts

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            unwanted: Any = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
            if other := tree.find(unwanted):
                raise SecurityError(f"{type(other).__name__.lower()}, which needs other files")
            counted: nodes.Template = Counted().visit(tree)
            return counted

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            __self.step()
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
            if isinstance(owner, str | bytes | list | tuple | dict):
                if name not in _METHODS:
                    raise SecurityError(f"the method {name} of {type(owner).__name__}")
                if name == "replace":
                    return __self.replaced(owner, *args, **kwargs)
                if name == "join":
                    return __self.joined_by(args[0] if args else (), str(owner))
            elif name in ("format", "format_map"):
                raise SecurityError("the method format")
            value = super().call(__context, __obj, *args, **kwargs)
            return value if owner is __self else __self.measured(value)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            self.step()
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            kind = str if isinstance(left, str) else list if isinstance(left, list) else tuple
            if operator == "+" and isinstance(left, kind) and isinstance(right, kind):
                return self.measured(left + right)  # type: ignore[operator]
            if not numbers or operator == "**":
                raise SecurityError(f"{operator} of {type(left).__name__} and {type(right).__name__}")
            value = super().call_binop(context, operator, left, right)
            if not abs(value) < 2**63:
                raise SecurityError("a number of more than 63 bits")
            return value

    return Bounded

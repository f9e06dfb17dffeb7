"""Regular expressions of somebody else's files, in time that is bounded: no backtracking, sets of positions instead.

Read is what names of layers are written with: characters, `.`, classes, groups, `|`, `* + ? {m,n}`, `^ $ \\b`. An expression is
a function from the positions where it may begin to those where it may have ended, so matching takes at most about
length of the pattern x length of the text squared steps.
"""

from __future__ import annotations

from collections.abc import Callable

_LONGEST = 500
_DEEPEST = 6
_CLASSES = {
    "d": str.isdigit,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}  # fmt: skip

Positions = frozenset[int]
Matcher = Callable[[str, Positions], Positions]
Test = Callable[[str], bool]


def fullmatch(pattern: str, text: str) -> bool:
    """Whether the pattern matches the whole text, as ``re.fullmatch``. ValueError for one that is not read here."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"a pattern of {len(pattern)} characters, expected at most {_LONGEST}")
    return len(text) in _Parser(pattern).whole()(text, frozenset((0,)))


class _Parser:
    def __init__(self, pattern: str):
        self.pattern, self.at, self.depth = pattern, 0, 0

    def whole(self) -> Matcher:
        found = self.alternatives()
        if self.at < len(self.pattern):
            raise ValueError("unbalanced parenthesis")
        return found

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        character = self.peek()
        if not character:
            raise ValueError("it ends too early")
        self.at += 1
        return character

    def alternatives(self) -> Matcher:
        branches = [self.sequence()]
        while self.peek() == "|":
            self.take()
            branches.append(self.sequence())
        if len(branches) == 1:
            return branches[0]
        return lambda text, starts: frozenset().union(*(branch(text, starts) for branch in branches))

    def sequence(self) -> Matcher:
        steps: list[Matcher] = []
        while self.peek() not in ("", "|", ")"):
            steps.append(self.repeated(self.atom()))

        def match(text: str, starts: Positions) -> Positions:
            for step in steps:
                starts = step(text, starts)
            return starts

        return match

    def repeated(self, atom: Matcher) -> Matcher:
        if self.peek() in ("*", "+", "?", "{"):
            low, high = self.count()
            self.at += self.peek() == "?"  # lazy, which changes no whole match
            if self.peek() in ("*", "+", "?", "{"):
                raise ValueError("a repeat of a repeat")
            atom = _repeat(atom, low, high)
        return atom

    def count(self) -> tuple[int, int | None]:
        sign = self.take()
        if sign != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        body, closed, _ = self.pattern[self.at :].partition("}")
        low, comma, high = body.partition(",")
        if not closed or not (low or high) or not all(n.isdecimal() or not n for n in (low, high)) or len(body) > 9:
            raise ValueError("a repeat that is none")
        self.at += len(body) + 1
        first = int(low or 0)
        last = first if not comma else int(high) if high else None
        if last is not None and last < first:
            raise ValueError("a repeat that is none")
        return first, last

    def atom(self) -> Matcher:
        character = self.take()
        if character == "(":
            return self.group()
        if character == "[":
            return _one(self.set())
        if character == ".":
            return _one(lambda c: c != "\n")
        if character == "^":
            return lambda _, starts: starts & {0}
        if character == "$":
            return lambda text, starts: starts & {len(text)}
        if character == "\\":
            return self.escape()
        if character in "*+?{":
            raise ValueError("nothing to repeat")
        return _one(character.__eq__)

    def group(self) -> Matcher:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError(f"groups nested more than {_DEEPEST} deep")
        if self.peek() == "?":
            self.take()
            if self.take() != ":":
                raise ValueError("a group that looks around, has a name or sets flags")
        found = self.alternatives()
        if self.take() != ")":
            raise ValueError("unbalanced parenthesis")
        self.depth -= 1
        return found

    def escape(self) -> Matcher:
        character = self.take()
        if character == "b":
            word = _CLASSES["w"]
            return lambda text, starts: frozenset(
                i for i in starts if any(map(word, text[max(0, i - 1) : i])) != any(map(word, text[i : i + 1]))
            )
        if character in "AZz":
            return lambda text, starts: starts & ({0} if character == "A" else {len(text)})
        return _one(self.escaped(character))

    def escaped(self, character: str) -> Test:
        """What one escaped character stands for."""
        if (test := _CLASSES.get(character.lower())) is not None:
            return test if character.islower() else lambda c: not test(c)
        if character.isalnum():
            raise ValueError(f"the escape \\{character}")
        return character.__eq__

    def set(self) -> Test:
        """A class after its "["."""
        negated = self.peek() == "^"
        self.at += negated
        tests: list[Test] = []
        while not tests or self.peek() != "]":
            first = self.take()
            if first == "\\":
                tests.append(self.escaped(self.take()))
            elif self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.take()
                tests.append(_between(first, self.take()))
            else:
                tests.append(first.__eq__)
        self.take()
        return lambda c: any(test(c) for test in tests) != negated


def _between(first: str, last: str) -> Test:
    if last == "\\" or last < first:
        raise ValueError(f"the range {first}-{last}")
    return lambda c: first <= c <= last


def _one(test: Test) -> Matcher:
    return lambda text, starts: frozenset(i + 1 for i in starts if i < len(text) and test(text[i]))


def _repeat(atom: Matcher, low: int, high: int | None) -> Matcher:
    def match(text: str, starts: Positions) -> Positions:
        for _ in range(min(low, len(text) + 1)):  # further rounds of a fixed set change nothing more
            starts = atom(text, starts)
        ends = starts
        rounds = 0
        while starts and (high is None or rounds < high - low):
            starts = atom(text, starts) - ends
            ends |= starts
            rounds += 1
        return ends

    return match

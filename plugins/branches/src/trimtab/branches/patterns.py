"""Regular expressions of clients, matched in time linear in the text: no pattern can hang a server.

The subset is that of RE2 without its rarities: literals, classes, groups, alternation, greedy and
lazy repetition, anchors. The machine is Pike's (R. Cox, "Regular Expression Matching: the Virtual
Machine Approach"): all ways to match go through the text side by side, the preferred one first, so
it finds what Python's ``re`` finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from trimtab.core.errors import BadInput

PATTERN_LIMIT = 256
"""Characters of a pattern."""

PROGRAM_LIMIT = 512
"""Instructions of a pattern: counted repetitions are written out."""

Test = Callable[[str], bool]
Place = Callable[[str, int], bool]


@dataclass(slots=True)
class _Instruction:
    """One step of the machine; which fields count depends on the kind."""

    kind: Literal["take", "fork", "place", "save", "match"]
    test: Test = field(default=lambda _: False)
    place: Place = field(default=lambda _, __: False)
    nexts: tuple[int, ...] = ()
    slot: int = 0


@dataclass(frozen=True, slots=True)
class _Node:
    """A parsed part: writes its instructions at the end of a program."""

    write: Callable[[list[_Instruction]], None]
    empty: bool
    """Whether it may match without taking a character."""


Saved = tuple[int, int, int, int]
"""Start and end of the match, and of the first group; -1 where there is none."""


class Pattern:
    """A regular expression of the subset.

    Args:
        text: the expression; ``(?i)``, ``(?m)`` and ``(?s)`` may stand at its head.

    Raises:
        BadInput: it is too long, wrong, or outside the subset.
    """

    def __init__(self, text: str) -> None:
        if len(text) > PATTERN_LIMIT:
            raise BadInput(
                f"the pattern has {len(text)} characters", fix=f"give at most {PATTERN_LIMIT}"
            )
        parser = _Parser(text)
        node = parser.whole()
        self._program: list[_Instruction] = []
        _save(self._program, 0)
        node.write(self._program)
        _save(self._program, 1)
        self._program.append(_Instruction("match"))
        self._group = parser.groups > 0

    def last(self, text: str, within_cpu_s: float) -> str | None:
        """The last match: its first group where the pattern has one, else all of it.

        Args:
            text: what is searched.
            within_cpu_s: seconds of this thread's work after which the search is given up.

        Returns:
            None if nothing matches, the group took no part, or the time is up.
        """
        found: Saved | None = None
        try:
            for saved in self._matches(text, time.thread_time() + within_cpu_s):
                found = saved
        except TimeoutError:
            return None
        if found is None:
            return None
        start, end = found[2:] if self._group else found[:2]
        return text[start:end] if start >= 0 else None

    def _matches(self, text: str, until_cpu_s: float) -> Iterator[Saved]:
        """All matches that do not overlap, from the left, as ``re.finditer`` has them."""
        position, after_empty = 0, False
        while position <= len(text):
            saved = self._search(text, position, after_empty, until_cpu_s)
            if saved is None:
                return
            yield saved
            position, after_empty = saved[1], saved[0] == saved[1]

    def _search(self, text: str, begin: int, not_empty: bool, until_cpu_s: float) -> Saved | None:
        """The leftmost match from a place on, the preferred among those.

        Args:
            text: what is searched.
            begin: the first place where it may start.
            not_empty: whether an empty match at ``begin`` is none, having been found already.
            until_cpu_s: when to give up.

        Raises:
            TimeoutError: the time is up.
        """
        found: Saved | None = None
        threads: dict[int, Saved] = {}
        for at in range(begin, len(text) + 1):
            if at % 16 == 0 and time.thread_time() > until_cpu_s:
                raise TimeoutError
            if found is None:
                self._follow(threads, 0, (at, -1, -1, -1), text, at)
            following: dict[int, Saved] = {}
            for counter, saved in threads.items():
                instruction = self._program[counter]
                if instruction.kind == "match":
                    if not_empty and saved[1] == begin:
                        continue
                    found = saved
                    break
                if at < len(text) and instruction.test(text[at]):
                    self._follow(following, instruction.nexts[0], saved, text, at + 1)
            threads = following
            if found is not None and not threads:
                break
        return found

    def _follow(
        self, threads: dict[int, Saved], counter: int, saved: Saved, text: str, at: int
    ) -> None:
        """Adds the threads that a program reaches without taking a character, preferred first."""
        seen: set[int] = set()
        pending = [(counter, saved)]
        while pending:
            counter, saved = pending.pop()
            if counter in threads or counter in seen:
                continue
            seen.add(counter)
            instruction = self._program[counter]
            if instruction.kind == "fork":
                pending += [(following, saved) for following in reversed(instruction.nexts)]
            elif instruction.kind == "save":
                slot = instruction.slot
                pending.append((counter + 1, (*saved[:slot], at, *saved[slot + 1 :])))  # type: ignore[arg-type]
            elif instruction.kind == "place":
                if instruction.place(text, at):
                    pending.append((counter + 1, saved))
            else:
                threads[counter] = saved


def _save(program: list[_Instruction], slot: int) -> None:
    program.append(_Instruction("save", slot=slot))


_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
    "D": lambda c: not c.isdecimal(),
    "W": lambda c: not (c.isalnum() or c == "_"),
    "S": lambda c: not c.isspace(),
}
_LITERALS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}


def _word_edge(text: str, at: int) -> bool:
    before = at > 0 and _CLASSES["w"](text[at - 1])
    after = at < len(text) and _CLASSES["w"](text[at])
    return before != after


_PLACES: dict[str, Place] = {
    "b": _word_edge,
    "B": lambda text, at: not _word_edge(text, at),
    "A": lambda text, at: at == 0,
    "Z": lambda text, at: at == len(text),
}


class _Parser:
    """Reads a pattern by recursive descent."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._size = 0
        self.groups = 0
        self._flags = self._head()

    def _head(self) -> str:
        """The flags at the pattern's head."""
        text = self._text
        end = text.find(")")
        flags = text[2:end]
        if not text.startswith("(?") or end < 3 or set(flags) - set("ims"):
            return ""
        self._at = end + 1
        return flags

    def whole(self) -> _Node:
        """The pattern as a node.

        Raises:
            BadInput: it is wrong or outside the subset.
        """
        node = self._alternatives(depth=0)
        if self._at < len(self._text):
            raise self._fault("an unmatched ')'")
        return node

    def _fault(self, what: str) -> BadInput:
        return BadInput(
            f"the pattern has {what} at character {self._at + 1}",
            fix="literals, classes, groups, | * + ? {m,n} and the anchors ^ $ \\b are understood",
        )

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _accept(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _counted(self, size: int) -> None:
        self._size += size
        if self._size > PROGRAM_LIMIT:
            raise self._fault("more repetition than can be written out")

    def _alternatives(self, depth: int) -> _Node:
        if depth > 20:
            raise self._fault("too deep a nesting")
        ways = [self._sequence(depth)]
        while self._accept("|"):
            ways.append(self._sequence(depth))
        return ways[0] if len(ways) == 1 else _either(ways)

    def _sequence(self, depth: int) -> _Node:
        nodes: list[_Node] = []
        while self._next() not in ("", "|", ")"):
            nodes.append(self._repeated(depth))
        return _chain(nodes)

    def _repeated(self, depth: int) -> _Node:
        before = self._size
        node = self._atom(depth)
        size = self._size - before
        bounds = self._bounds()
        if bounds is None:
            return node
        low, high = bounds
        if node.empty:
            raise self._fault("a repetition of something that may be empty")
        if high is not None and high < low:
            raise self._fault("a repetition whose bounds are the wrong way round")
        self._counted((size + 1) * max(low, high or 0, 1))
        lazy = self._accept("?")
        if self._next() in ("*", "+", "?"):
            raise self._fault("a repetition of a repetition")
        return _repetition(node, low, high, lazy)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._accept(sign):
                return bounds
        if self._next() != "{":
            return None
        end = self._text.find("}", self._at)
        low, comma, high = self._text[self._at + 1 : max(end, 0)].partition(",")
        numbers = [n for n in (low, high) if n]
        if not low or not all(n.isascii() and n.isdigit() and len(n) < 4 for n in numbers):
            raise self._fault("a '{' that begins no repetition (write \\{)")
        self._at = end + 1
        return int(low), int(high) if high else None if comma else int(low)

    def _atom(self, depth: int) -> _Node:
        sign = self._next()
        self._at += 1
        if sign == "(":
            return self._group(depth)
        self._counted(1)
        if sign == "[":
            return _take(self._set())
        if sign == "\\":
            return self._escape()
        if sign == ".":
            return _take(_anything if "s" in self._flags else _no_line_end)
        if sign in "^$":
            return _at(self._edge(sign))
        if sign in "*+?{":
            self._at -= 1
            raise self._fault(
                "a repetition of nothing" if sign != "{" else "a bare '{' (write \\{)"
            )
        return _take(self._literal(sign))

    def _edge(self, sign: str) -> Place:
        if "m" in self._flags:
            return _line_begins if sign == "^" else _line_ends
        return _PLACES["A"] if sign == "^" else _text_ends

    def _group(self, depth: int) -> _Node:
        captures = not self._accept("?:")
        if captures and self._next() == "?":
            raise self._fault("a group of a kind that is not understood")
        self.groups += captures
        first = captures and self.groups == 1
        node = self._alternatives(depth + 1)
        if not self._accept(")"):
            raise self._fault("a group without its end")
        return _captured(node) if first else node

    def _escape(self) -> _Node:
        sign = self._next()
        self._at += 1
        if sign in _CLASSES:
            return _take(_CLASSES[sign])
        if sign in _PLACES:
            return _at(_PLACES[sign])
        return _take(self._literal(self._escaped(sign)))

    def _escaped(self, sign: str) -> str:
        if sign in _LITERALS:
            return _LITERALS[sign]
        if not sign or sign.isalnum():
            raise self._fault("an escape that is not understood")
        return sign

    def _literal(self, sign: str) -> Test:
        if "i" not in self._flags:
            return lambda c: c == sign
        folded = sign.lower()
        return lambda c: c.lower() == folded

    def _set(self) -> Test:
        negated = self._accept("^")
        tests: list[Test] = []
        while not tests or self._next() != "]":
            low = self._member()
            if not isinstance(low, str):
                tests.append(low)
            elif self._next() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                tests.append(self._range(low, self._member()))
            else:
                tests.append(self._literal(low))
        self._at += 1
        return _none_of(tests) if negated else _one_of(tests)

    def _member(self) -> str | Test:
        sign = self._next()
        if not sign:
            raise self._fault("a class without its end")
        self._at += 1
        if sign != "\\":
            return sign
        sign = self._next()
        self._at += 1
        return _CLASSES[sign] if sign in _CLASSES else self._escaped(sign)

    def _range(self, low: str, high: str | Test) -> Test:
        if not isinstance(high, str) or high < low:
            raise self._fault("a range whose ends are the wrong way round")
        if "i" not in self._flags:
            return lambda c: low <= c <= high
        return lambda c: low <= c.lower() <= high or low <= c.upper() <= high


def _anything(_: str) -> bool:
    return True


def _no_line_end(c: str) -> bool:
    return c != "\n"


def _line_begins(text: str, at: int) -> bool:
    return at == 0 or text[at - 1] == "\n"


def _line_ends(text: str, at: int) -> bool:
    return at == len(text) or text[at] == "\n"


def _text_ends(text: str, at: int) -> bool:
    return at == len(text) or (at == len(text) - 1 and text[at] == "\n")


def _one_of(tests: list[Test]) -> Test:
    return lambda c: any(test(c) for test in tests)


def _none_of(tests: list[Test]) -> Test:
    return lambda c: not any(test(c) for test in tests)


def _take(test: Test) -> _Node:
    def write(program: list[_Instruction]) -> None:
        program.append(_Instruction("take", test=test, nexts=(len(program) + 1,)))

    return _Node(write, empty=False)


def _at(place: Place) -> _Node:
    return _Node(lambda program: program.append(_Instruction("place", place=place)), empty=True)


def _chain(nodes: list[_Node]) -> _Node:
    def write(program: list[_Instruction]) -> None:
        for node in nodes:
            node.write(program)

    return _Node(write, empty=all(node.empty for node in nodes))


def _captured(node: _Node) -> _Node:
    def write(program: list[_Instruction]) -> None:
        _save(program, 2)
        node.write(program)
        _save(program, 3)

    return _Node(write, node.empty)


def _fork(program: list[_Instruction]) -> _Instruction:
    """A fork whose ways are filled in once they are known."""
    fork = _Instruction("fork")
    program.append(fork)
    return fork


def _either(ways: list[_Node]) -> _Node:
    def write(program: list[_Instruction]) -> None:
        fork = _fork(program)
        ends: list[_Instruction] = []
        for way in ways:
            fork.nexts += (len(program),)
            way.write(program)
            ends.append(_fork(program))
        for end in ends:
            end.nexts = (len(program),)

    return _Node(write, any(way.empty for way in ways))


def _repetition(node: _Node, low: int, high: int | None, lazy: bool) -> _Node:
    def ways(go_on: int, leave: int) -> tuple[int, int]:
        return (leave, go_on) if lazy else (go_on, leave)

    def write(program: list[_Instruction]) -> None:
        for _ in range(low):
            node.write(program)
        if high is None:
            fork = _fork(program)
            body = len(program)
            node.write(program)
            back = _fork(program)
            back.nexts = (body - 1,)
            fork.nexts = ways(body, len(program))
            return
        forks = []
        for _ in range(high - low):
            forks.append((_fork(program), len(program)))
            node.write(program)
        for fork, body in forks:
            fork.nexts = ways(body, len(program))

    return _Node(write, empty=low == 0)

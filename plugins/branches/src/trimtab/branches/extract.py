"""The answer in a branch's text, and when two answers are the same: what a vote counts."""

from __future__ import annotations

import importlib
import json
import logging
import re
import unicodedata
from collections.abc import Callable
from decimal import Context, Decimal
from functools import cache
from typing import Any

from trimtab.branches.patterns import Pattern
from trimtab.core.errors import BadInput

logger = logging.getLogger(__name__)

Extractor = Callable[[str], str | None]
"""Gives the answer in a text, or None where it has none."""

TAIL_CHARACTERS = 32_768
"""Answers stand at the end: what comes before these characters is not searched."""

PATTERN_TAIL_CHARACTERS = 8_192
PATTERN_WITHIN_CPU_S = 0.1
ANSWER_LIMIT = 1_024
"""Characters of an answer."""

RULES = "none, boxed, final, json:FIELD or regex:PATTERN"


def extractor(rule: str, where: str = "") -> Extractor:
    r"""The extractor that a rule names.

    Args:
        rule: ``none`` (the whole text is the answer), ``boxed`` (the last ``\boxed{}``),
            ``final`` ("final answer: …" and its kin), ``json:FIELD`` (of the last JSON object that
            has it; a dot goes one object deeper) or ``regex:PATTERN`` (the last match's first
            group, or all of it).
        where: the place of the rule, for errors.

    Raises:
        BadInput: there is no such rule, or its field or pattern is wrong.
    """
    name, _, argument = rule.partition(":")
    if rule in _PLAIN:
        return _PLAIN[rule]
    if name == "json" and argument and all(argument.split(".")):
        return _json_extractor(argument.split("."))
    if name == "regex" and argument:
        try:
            pattern = Pattern(argument)
        except BadInput as error:
            raise BadInput(error.what, where=where, fix=error.fix) from None
        return lambda text: _kept(
            pattern.last(text[-PATTERN_TAIL_CHARACTERS:], PATTERN_WITHIN_CPU_S)
        )
    raise BadInput(f"there is no rule {rule[:80]!r}", where=where, fix=f"give {RULES}")


def load_function(path: str, where: str = "") -> Extractor:
    """An extractor of the server's owner: ``module:function``, from text to answer or None.

    Raises:
        BadInput: it cannot be imported, or is no function.
    """
    module, _, name = path.partition(":")
    fix = "give MODULE:FUNCTION, importable by the server"
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"{path!r} cannot be imported ({error})", where=where, fix=fix) from None
    if not callable(function):
        raise BadInput(f"{path!r} is no function", where=where, fix=fix)

    def extract(text: str) -> str | None:
        try:
            found = function(text)
        except Exception:
            _complain(path)
            return None
        return None if found is None else _kept(str(found))

    return extract


@cache
def _complain(path: str) -> None:
    """Says once that a function of the owner fails."""
    logger.exception("The extractor %s failed; such texts count as having no answer.", path)


def _kept(found: str | None) -> str | None:
    """What was found, if it is an answer at all."""
    stripped = (found or "").strip()
    return stripped[:ANSWER_LIMIT] or None


def whole(text: str) -> str | None:
    """The whole text."""
    return _kept(text)


_BRACES = re.compile(r"\\boxed\s{0,2}\{|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
    r"""What stands in the last balanced ``\boxed{}``."""
    tail = text[-TAIL_CHARACTERS:]
    opened: list[int] = []
    last = (-1, -1)
    for found in _BRACES.finditer(tail):
        if found[0].endswith("{") and found[0] != r"\{":
            opened.append(found.end() if found[0] != "{" else -1)
        elif found[0] == "}" and opened:
            last = max(last, (opened.pop(), found.start()))
    return _kept(tail[last[0] : last[1]]) if last[0] >= 0 else None


_HEADS = tuple(
    re.compile(head, re.IGNORECASE)
    for head in (
        r"\bfinal\s{1,3}answer\b[*_\s]{0,4}(?:is\b|[:=])?",
        r"####",
        r"\banswer\b[*_\s]{0,4}(?:is\b|[:=])",
    )
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_ORNAMENT = " \t*_`$:=\"'"


def final(text: str) -> str | None:
    """What follows the last "final answer", ``####``, or "answer is": up to its sentence's end."""
    tail = text[-TAIL_CHARACTERS:]
    for head in _HEADS:
        places = [found.end() for found in head.finditer(tail)]
        if places:
            return _said(tail[places[-1] :])
    return None


def _said(text: str) -> str | None:
    lines = (line.strip(_ORNAMENT) for line in text.split("\n", 4)[:4])
    line = next(filter(None, lines), "")
    within = boxed(text[: text.find(line) + len(line)]) if line else None
    return within or _kept(_SENTENCE_END.split(line, maxsplit=1)[0].strip(_ORNAMENT))


def _json_extractor(path: list[str]) -> Extractor:
    def extract(text: str) -> str | None:
        found: Any = None
        for item in _objects(text[-TAIL_CHARACTERS:]):
            value = _at_path(item, path)
            found = found if value is None else value
        if found is None or isinstance(found, str):
            return _kept(found)
        return _kept(json.dumps(found, sort_keys=True, ensure_ascii=False))

    return extract


def _objects(text: str) -> list[Any]:
    """The JSON objects in a text that lie in no other."""
    decoder, found = json.JSONDecoder(), []
    at, looked = text.find("{"), 0
    while at >= 0 and looked < 8 * TAIL_CHARACTERS:
        try:
            item, end = decoder.raw_decode(text, at)
            found.append(item)
        except json.JSONDecodeError as error:
            looked += error.pos - at + 1
            end = at + 1
        except (RecursionError, ValueError):  # too deep, or an integer of thousands of digits
            looked += TAIL_CHARACTERS
            end = at + 1
        at = text.find("{", end)
    return found


def _at_path(item: Any, path: list[str]) -> Any:
    for name in path:
        item = item.get(name) if isinstance(item, dict) else None
    return item


_PLAIN: dict[str, Extractor] = {"none": whole, "boxed": boxed, "final": final}

_SPACING = re.compile(r"\\[,!; ]|\{,\}|\\(?=[$%])")
_NUMBER = re.compile(
    r"([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?(?:e[+-]?[0-9]{1,2})?)(%?)"
)
_NUMBER_LIMIT = 64
_EXACT = Context(prec=2 * _NUMBER_LIMIT)


def normalised(answer: str) -> str:
    """An answer as a vote compares it: 1,000 is 1000, 0.50 is .5, case and white space are one.

    Applied twice it changes nothing more.
    """
    text = answer[:ANSWER_LIMIT]
    while (plain := _plainer(text)) != text:
        text = plain
    return text


def _plainer(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _SPACING.sub(lambda found: "," if found[0] == "{,}" else "", text)
    text = " ".join(text.split()).strip(" $*_`\"'").rstrip(" .,;:!")
    return _number(text.replace("\u2212", "-")) or text


def _number(text: str) -> str | None:
    """A number's one spelling; None if the text is no number."""
    found = _NUMBER.fullmatch(text) if len(text) <= _NUMBER_LIMIT else None
    if found is None or not any(c.isdigit() for c in found[2].partition("e")[0]):
        return None
    number = _EXACT.create_decimal(found[2].replace(",", ""))
    sign = "-" if found[1] == "-" and number else ""
    return f"{sign}{_shortest(number)}{found[3]}"


def _shortest(number: Decimal) -> str:
    digits = format(number, "f")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return digits.lstrip("0") if digits.startswith("0") and digits[1:2].isdigit() else digits or "0"

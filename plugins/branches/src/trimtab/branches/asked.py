"""What a request over HTTP asks of its branches, checked, and the body the engine gets for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from trimtab.branches.config import Answer, BranchesConfig, Pruning, Show
from trimtab.branches.extract import Extractor, extractor, load_function
from trimtab.branches.fields import FIELDS
from trimtab.core.errors import BadInput
from trimtab.core.policy import FIELD_PREFIX, FieldValue
from trimtab.hosts.vllm import call_fields

_OBJECTS = ("vllm_xargs", "stream_options")


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request asks.

    Attributes:
        branches: how many are launched (N).
        enough: how many must finish (M).
        answer: which finished branch wins.
        rule: the extractor's name, as the response repeats it.
        extract: finds the answer in a text.
        show_all: whether the client gets every branch.
        progress: whether a stream tells of the branches before it has an answer.
        scored_late: whether scores may be asked for when the branches have ended.
    """

    branches: int
    enough: int
    answer: str
    rule: str
    extract: Extractor
    show_all: bool
    progress: bool
    scored_late: bool = False


def what_is_asked(content: Mapping[str, Any], config: BranchesConfig) -> Asked | None:
    """What a request's body asks of its branches; None if it asks for none, or for one alone.

    Raises:
        BadInput: a field is wrong, or does not go with the rest; ``where`` is its name.
    """
    if any(not isinstance(content.get(name) or {}, dict) for name in _OBJECTS):
        return None  # the server will say what is wrong with it
    xargs = content.get("vllm_xargs") or {}
    ours = {FIELD_PREFIX + name for name in FIELDS}
    said = call_fields.from_xargs({key: xargs[key] for key in xargs.keys() & ours}, FIELDS)
    branches = said.get("branches")
    if branches is None:
        branches = config.n if _leaves_it_to_the_server(content) else None
    else:
        _check_branches(int(branches), content, config)
    if branches is None:
        return None
    _one_of(said, "pruning", Pruning)
    asked = _asked(int(branches), said, config)
    return asked if asked.branches > 1 else None


def _asked(branches: int, said: Mapping[str, FieldValue], config: BranchesConfig) -> Asked:
    rule = str(said.get("extract", config.extract))
    extract = extractor(rule, where=_key("extract"))
    if config.extractor is not None:
        rule, extract = "the server's", load_function(config.extractor, where="extractor")
    return Asked(
        branches=branches,
        enough=_enough(branches, said, config),
        answer=_one_of(said, "answer", Answer) or config.answer,
        rule=rule,
        extract=extract,
        show_all=(_one_of(said, "show", Show) or config.show) == "all",
        progress=bool(said.get("progress")),
        scored_late="prm" in config.signals and config.prm is not None,
    )


def for_engine(content: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """The body of the same request that launches the branches."""
    xargs = {**(content.get("vllm_xargs") or {}), f"{FIELD_PREFIX}branches": asked.branches}
    changed = {**content, "n": asked.branches, "vllm_xargs": xargs}
    if content.get("stream"):
        # So every chunk says how long its branch is by now.
        counted = {"include_usage": True, "continuous_usage_stats": True}
        changed["stream_options"] = {**(content.get("stream_options") or {}), **counted}
    if needs_ids(content, asked):
        changed["return_token_ids"] = True
    return changed


def needs_ids(content: Mapping[str, Any], asked: Asked) -> bool:
    """Whether token ids are needed that the client did not ask for.

    For a late score, and for the branches' lengths: the server itself ends a branch at a stop
    string, and the engine then sends no note of it; only a stream counts tokens in another way.
    Where the prompt is echoed, its tokens would stand among the branch's.
    """
    if content.get("return_token_ids") or content.get("echo"):
        return False
    return asked.scored_late or bool(content.get("stop") and not content.get("stream"))


def _key(name: str) -> str:
    return f"vllm_xargs, {FIELD_PREFIX}{name}"


def _leaves_it_to_the_server(content: Mapping[str, Any]) -> bool:
    """Whether the server's own number of branches applies: not where all would be the same."""
    sampled = content.get("temperature") != 0 and not content.get("use_beam_search")
    return sampled and content.get("n") in (None, 1) and content.get("max_tokens") != 0


def _check_branches(branches: int, content: Mapping[str, Any], config: BranchesConfig) -> None:
    if branches > config.max_branches:
        raise BadInput(
            f"{branches} branches are more than this server launches",
            where=_key("branches"),
            fix=f"give at most {config.max_branches}",
        )
    if content.get("n") not in (None, branches):
        raise BadInput(
            f"n is {str(content['n'])[:20]}, and {branches} branches are asked for",
            where="n",
            fix="leave n out",
        )
    if content.get("use_beam_search") and branches > 1:
        raise BadInput(
            "beam search has no branches",
            where="use_beam_search",
            fix="leave out use_beam_search or the branches",
        )


def _enough(branches: int, said: Mapping[str, FieldValue], config: BranchesConfig) -> int:
    enough = said.get("enough")
    if enough is None:
        return min(branches, config.m or (branches + 1) // 2)
    if enough > branches:  # type: ignore[operator]
        raise BadInput(
            f"{enough} of {branches} branches cannot finish",
            where=_key("enough"),
            fix=f"give at most {branches}",
        )
    return int(enough)


def _one_of(said: Mapping[str, FieldValue], name: str, kind: Any) -> str | None:
    value, known = said.get(name), get_args(kind)
    if value is not None and value not in known:
        raise BadInput(
            f"{str(value)[:80]!r} is not known",
            where=_key(name),
            fix=f"give {' or '.join(known)}",
        )
    return None if value is None else str(value)

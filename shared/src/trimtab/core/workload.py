"""Workloads: requests with arrival times, lengths, workflows and deadlines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """One LLM request of a workload.

    Attributes:
        request_id: unique within the workload.
        arrival_s: seconds after the workload's start; for a request with ``depends_on`` the
            earliest time it may be issued (it is issued ``gap_s`` after its last dependency).
        prompt_tokens: length of the prompt.
        output_tokens: tokens that are generated (realised, hidden from policies).
        model: which model serves it; None where there is one.
        workflow: the workflow it is a stage of.
        stage: the name of that stage.
        deadline_s: the whole workflow's deadline, relative to the workflow's arrival.
        depends_on: ids of the requests that must finish first.
        gap_s: seconds between the last dependency's end and the issue (a tool call, say).
        prefix: the name of the prompt's shared prefix.
        prefix_tokens: the length of that prefix.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    model: str | None = None
    workflow: str | None = None
    stage: str | None = None
    deadline_s: float | None = None
    depends_on: tuple[str, ...] = ()
    gap_s: float = 0.0
    prefix: str | None = None
    prefix_tokens: int = 0

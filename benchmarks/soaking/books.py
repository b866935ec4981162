"""The clients' own count of what they sent and what became of it, and the server's, which must say the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

WORK_ROUTES = ("/rollout/generate", "/generate")
_SERIES = re.compile(r"^(flowroll_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(slots=True, kw_only=True)
class Books:
    """What the clients of one server saw.

    Attributes:
        sent: Requests to the work routes.
        answers: The number that was answered, by status; an answer that was not read to its end counts.
        left_waiting: The number that was left by its client before an answer.
        left_sending: The number that was left by its client in the middle of the request's body.
        behaviours: Visits, by what the client did.
        samples: That came back.
        checked: The number that was compared with the truth.
        alive_s: Seconds that /liveness took.
        held_bytes: The most bytes of answers that the server said it expects or has not sent.
        wrong: What broke a promise, in words.
        updates: Weight updates that succeeded.
        pauses: Pauses.
    """

    sent: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    left_waiting: int = 0
    left_sending: int = 0
    behaviours: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    checked: int = 0
    alive_s: list[float] = field(default_factory=list)
    held_bytes: int = 0
    wrong: list[str] = field(default_factory=list)
    updates: int = 0
    pauses: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCounts:
    """What /metrics says.

    Attributes:
        answers: HTTP requests to the work routes, by status.
        accepted: Requests that entered the queue.
        completed: The number that ended in a result.
        failed: The number that ended in an error, by code.
        dropped: Requests whose client was gone before they entered the queue.
        held_bytes: The bytes of answers that are expected or not sent.
        unfinished: Requests that wait or run.
        running_samples: The number of samples in memory.
    """

    answers: Mapping[int, int]
    accepted: int
    completed: int
    failed: Mapping[str, int]
    dropped: int
    held_bytes: int
    unfinished: int
    running_samples: int

    @classmethod
    def read(cls, text: str) -> ServerCounts:
        """From the text of /metrics."""
        series = [(name, dict(_LABEL.findall(labels or "")), float(value)) for name, labels, value in _SERIES.findall(text)]

        def total(wanted: str, **labels: str) -> int:
            return int(sum(value for name, has, value in series if name == wanted and labels.items() <= has.items()))

        codes = {int(has["code"]) for name, has, _ in series if name == "flowroll_requests_total"}
        failures = {has["code"] for name, has, _ in series if name == "flowroll_failed_requests_total"}
        return cls(
            answers={
                code: sum(total("flowroll_requests_total", code=str(code), route=route) for route in WORK_ROUTES)
                for code in codes
            },
            accepted=total("flowroll_accepted_requests_total"),
            completed=total("flowroll_ended_requests_total", outcome="completed"),
            failed={code: total("flowroll_failed_requests_total", code=code) for code in failures},
            dropped=total("flowroll_dropped_requests_total"),
            held_bytes=total("flowroll_expected_answer_bytes") + total("flowroll_unsent_answer_bytes"),
            unfinished=total("flowroll_queue_depth") + total("flowroll_running_requests"),
            running_samples=total("flowroll_running_samples"),
        )


def imbalances(books: Books, server: ServerCounts) -> list[str]:
    """Where the two do not agree, or the server's do not balance; none: every request ended once, as both sides saw it.

    What the server answered to clients that had left, nobody saw: those answers may only be 200 (made before the server
    noticed), 499, or the refusals of a full queue and a pause.
    """
    unseen = Counter(server.answers)
    unseen.subtract(books.answers)
    unseen[499] -= books.left_sending
    failed = sum(server.failed.values())
    claims = {
        "accepted = completed + failed": (server.accepted, server.completed + failed),
        "nothing is unfinished": (server.unfinished + server.running_samples, 0),
        "no answer is held": (server.held_bytes, 0),
        "sent = answered + left": (books.sent, sum(books.answers.values()) + books.left_waiting + books.left_sending),
        "answers that nobody saw = clients that left while they waited": (sum(unseen.values()), books.left_waiting),
        "of the codes that those may have": (
            sum(map(abs, unseen.values())),
            sum(max(unseen[c], 0) for c in (200, 409, 429, 499)),
        ),
        "completed = 200s": (server.completed, server.answers.get(200, 0)),
        "cancelled, or dropped before the queue = 499s of requests that were read": (
            server.failed.get("cancelled", 0) + server.dropped,
            server.answers.get(499, 0) - books.left_sending,
        ),
        "past their deadline = 408s": (server.failed.get("deadline_exceeded", 0), server.answers.get(408, 0)),
        "no other failure": (failed, server.failed.get("cancelled", 0) + server.failed.get("deadline_exceeded", 0)),
        "no answer 500": (server.answers.get(500, 0), 0),
    }
    return [f"{claim}: {left} and {right}" for claim, (left, right) in claims.items() if left != right]

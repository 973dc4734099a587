"""What can be wrong with a topology: stable codes, explained one by one in `docs/findings.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

INFO, WARNING, CRITICAL = "info", "warning", "critical"


@dataclass(frozen=True)
class Kind:
    """A sort of finding: how bad it is, what follows from it, and what to do."""

    severity: str
    consequence: str
    remedy: str


APPLY = "run `celery -A APP dlx topology apply`"
RECREATE = "let its consumers drain the queue, delete it, and start a worker: it is created anew"

#: By code. Codes are never given a second meaning.
KINDS: dict[str, Kind] = {
    "DLX101": Kind(CRITICAL, "letters have no way to any DLQ", APPLY),
    "DLX102": Kind(
        CRITICAL,
        "letters are routed wrongly, or the exchange is gone after a restart",
        "name another one in `topology.exchange`, or delete it once nothing uses it",
    ),
    "DLX103": Kind(CRITICAL, "letters of this queue have nowhere to go", APPLY),
    "DLX104": Kind(CRITICAL, "letters of this queue are dropped: nothing is bound by its name", APPLY),
    "DLX105": Kind(
        WARNING,
        "letters are on one node only, and may be lost with it",
        "drain it with `dlx replay` or `dlx export`, delete it, apply",
    ),
    "DLX106": Kind(CRITICAL, "letters that are looked at too often are deleted by the broker", APPLY),
    "DLX107": Kind(
        CRITICAL,
        "letters that are looked at too often are deleted by the broker, and no policy can change it",
        "do not read it but with `--force`; drain it (`dlx replay --all --force`), delete it, apply",
    ),
    "DLX108": Kind(WARNING, "letters are kept longer or shorter than the policy file says", APPLY),
    "DLX109": Kind(
        WARNING,
        "letters are dropped earlier than the policy file says",
        "drain the DLQ, delete it, apply; or lower the cap in the policy file",
    ),
    "DLX110": Kind(
        WARNING, "letters that die by TTL, overflow or delivery limit are lost; those of failing tasks are not", APPLY
    ),
    "DLX111": Kind(
        WARNING,
        "what only the broker sees die goes to another exchange than the policy file says, and no DLQ of ours has it",
        "if that is not wanted: change the policy or the declaration that sets it",
    ),
    "DLX112": Kind(
        CRITICAL, "what the broker dead-letters is routed by another key, to no DLQ or to the wrong one", RECREATE
    ),
    "DLX113": Kind(INFO, "nothing yet: its first worker or producer creates it, with dead-lettering", "none needed"),
    "DLX114": Kind(WARNING, "messages are redelivered another number of times than the policy file says", RECREATE),
    "DLX115": Kind(INFO, "the value that was set on the broker counts", "change one of the two, so that they agree"),
    "DLX116": Kind(INFO, "the queue stays as it is: the type only counts for queues we create", "none needed"),
    "DLX117": Kind(INFO, "an operator policy limits what the policy file may ask for", "ask the operators of the broker"),
    "DLX118": Kind(
        CRITICAL, "the broker deletes it with all its letters", "take `expires` out of the policy that matches it"
    ),
    "DLX119": Kind(CRITICAL, "its letters have nowhere to go", "shorten `topology.queue` or the queue's name"),
    "DLX120": Kind(
        WARNING, "the queue's dead-lettering, or a limit that was copied from another policy, is not as it should be", APPLY
    ),
    "DLX121": Kind(CRITICAL, "another policy counts instead of ours: what only the broker sees die is lost", APPLY),
    "DLX122": Kind(WARNING, "which of two policies counts is undefined", "give them different priorities"),
    "DLX123": Kind(WARNING, "a policy of ours is there for a queue that needs none", APPLY),
    "DLX130": Kind(
        WARNING, "nothing can be changed by this user", "run the commands shown, or give the user the tag policymaker"
    ),
    "DLX131": Kind(
        INFO,
        "bindings and RabbitMQ policies cannot be seen or set over AMQP",
        "set `topology.management_url` or CELERY_DLX_MANAGEMENT_URL",
    ),
    "DLX140": Kind(
        CRITICAL,
        "whichever service starts first decides; the other one's settings do not count",
        "let one policy file manage the queue",
    ),
    "DLX150": Kind(
        CRITICAL, "dead-lettering silently falls back to at-most-once", "let the queue be a quorum queue, or drop `strategy`"
    ),
    "DLX151": Kind(
        CRITICAL,
        "dead-lettering silently falls back to at-most-once",
        "at-least-once needs overflow reject-publish: change the policy or the declaration that says drop-head",
    ),
    "DLX153": Kind(
        WARNING,
        "they would be lost if their dead-lettering were changed now",
        "see why its DLQ takes no letters, then apply",
    ),
    "DLX152": Kind(
        INFO,
        "a full queue refuses messages instead of dead-lettering the oldest: no letter has the reason maxlen",
        "none needed",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found. ``subject`` is the queue, exchange or policy it is about."""

    code: str
    subject: str
    message: str

    @property
    def severity(self) -> str:
        return KINDS[self.code].severity

    def as_dict(self) -> dict[str, Any]:
        kind = KINDS[self.code]
        return {
            "type": "finding",
            "code": self.code,
            "severity": kind.severity,
            "subject": self.subject,
            "message": self.message,
            "consequence": kind.consequence,
            "remedy": kind.remedy,
        }

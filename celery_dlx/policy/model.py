"""The policy file's shape: what each key means and accepts.

The JSON Schema that ships with the package (`schema.json`) is made from these classes; a test holds them together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator

from celery_dlx.arguments import steps_of
from celery_dlx.letters import Reason
from celery_dlx.policy.durations import DURATION_PATTERN, SIZE_PATTERN, parse_duration, parse_size

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {
            "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": DURATION_PATTERN}],
            "description": "30s, 5m, 12h, 30d or seconds",
        }
    ),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": SIZE_PATTERN}],
            "description": "64KiB, 1GiB or bytes",
        }
    ),
]
Count = Annotated[int, Field(ge=1, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


def _whole_number(value: object) -> object:
    # `true` and `1.0` equal 1 in Python, and so do to pydantic's Literal.
    if type(value) is not int:
        raise ValueError(f"expected 1, found {value!r}")
    return value


def _known_reason(value: object) -> object:
    if not isinstance(value, str) or value not in REASONS:
        raise ValueError(f"expected one of {', '.join(REASONS)}, found {value!r}")
    return value


def _known_path(value: object) -> object:
    if not isinstance(value, str) or not steps_of(value):
        raise ValueError(f"expected a path such as kwargs.card.number or args[0], found {value!r}")
    return value


REASONS = tuple(str(reason) for reason in Reason)
ReasonName = Annotated[str, BeforeValidator(_known_reason), WithJsonSchema({"type": "string", "enum": list(REASONS)})]


ArgumentPath = Annotated[
    str, BeforeValidator(_known_path), WithJsonSchema({"type": "string", "pattern": r"^(args|kwargs)([.\[].+)?$"})
]


class Section(BaseModel):
    """Refuses unknown keys; the loader adds the position and a suggestion."""

    model_config = ConfigDict(extra="forbid")


class DeadLetterSection(Section):
    """What becomes of this queue's dead messages."""

    enabled: Flag | None = Field(None, description="false: leave this queue's dead messages to Celery")
    on: list[ReasonName] | None = Field(None, description="reasons to capture; default: all but `revoked`")
    max_length: Count | None = Field(None, description="letters kept in the DLQ, oldest dropped first")
    max_bytes: Size | None = Field(None, description="bytes of message bodies kept in the DLQ")
    max_age: Duration | None = Field(None, description="how long a letter is kept")
    redact: list[ArgumentPath] | None = Field(
        None, description="paths of arguments that are not shown: kwargs.card.number, args[0]"
    )
    redact_stored: Flag | None = Field(
        None, description="blank them in what is stored, too (JSON only): such letters need --edit to be replayed"
    )
    strategy: Literal["at-most-once", "at-least-once"] | None = Field(
        None, description="how RabbitMQ dead-letters by itself; at-least-once needs a quorum queue, and refuses overflow"
    )


class QueueSection(Section):
    """Settings of a queue, or of all queues a glob matches. The first five: absent = the task's or app's own."""

    acks_late: Flag | None = Field(None, description="acknowledge after the task ran, not before")
    reject_on_worker_lost: Flag | None = Field(None, description="redeliver when the process running it dies")
    time_limit: Duration | None = Field(None, description="the process is killed after this")
    soft_time_limit: Duration | None = Field(None, description="SoftTimeLimitExceeded is raised after this")
    max_deliveries: Count | None = Field(None, description="deliveries in all before a message is poison")
    type: Literal["classic", "quorum"] | None = Field(None, description="RabbitMQ type of a queue we create")
    message_ttl: Duration | None = Field(None, description="waiting longer than this is death by `expired`")
    max_length: Count | None = Field(None, description="overflow is death by `maxlen`")
    dead_letter: DeadLetterSection | None = None


class TopologySection(Section):
    """Names of what is declared on the broker."""

    exchange: Annotated[str, Field(min_length=1, max_length=255)] = "celery.dlx"
    queue: str = Field("{queue}.dlq", description="name of each queue's DLQ; {queue} is the source queue's name")
    via: Literal["arguments", "policy"] = "arguments"
    management_url: Annotated[str, Field(pattern=r"^https?://.+")] | None = Field(
        None, description="of RabbitMQ's management API, without credentials; CELERY_DLX_MANAGEMENT_URL overrides it"
    )

    @field_validator("queue")
    @classmethod
    def _names_the_queue(cls, value: str) -> str:
        if "{queue}" not in value or value == "{queue}":
            raise ValueError(f"expected a name that contains {{queue}} and more, such as {{queue}}.dlq, found {value!r}")
        if "{" in value.replace("{queue}", "") or "}" in value.replace("{queue}", ""):
            raise ValueError(f"expected no placeholder but {{queue}}, found {value!r}")
        return value


class PolicyFile(Section):
    """A celery-dlx policy: one file per service."""

    version: Annotated[Literal[1], BeforeValidator(_whole_number)] = Field(description="of this format")
    service: Annotated[str, Field(min_length=1, max_length=255)] | None = Field(
        None, description="shows in every dead letter"
    )
    topology: TopologySection = Field(default_factory=TopologySection)
    defaults: QueueSection = Field(default_factory=QueueSection, description="for every queue below")
    queues: dict[Annotated[str, Field(min_length=1, max_length=255)], QueueSection] | None = Field(
        None, description="by name or glob; the most specific entry wins. Absent: every queue"
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file (draft 2020-12), for editors and `dlx policy schema`."""
    schema = PolicyFile.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "celery-dlx policy"
    return schema

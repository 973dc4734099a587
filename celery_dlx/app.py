"""`DeadLetters`: attaches a policy to a Celery app, and gives access to its dead letters."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from heapq import merge
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery.signals import celeryd_init

from celery_dlx import selection
from celery_dlx.brokers.base import Broker, Looking, QueueStats, Replayed, Run
from celery_dlx.brokers.cover import BrokerCover
from celery_dlx.brokers.queues import identity, queues_class
from celery_dlx.brokers.redis import install as install_redis_transport
from celery_dlx.choice import Choice, describe
from celery_dlx.errors import (
    AlreadyInstalledError,
    BrokerUrlError,
    NotInstalledError,
    PolicyError,
    UnknownLetterError,
    UnsupportedBrokerError,
    UsageError,
)
from celery_dlx.groups import Group, Groups
from celery_dlx.journal import QueueLocks
from celery_dlx.letters import DeadLetter
from celery_dlx.policy.settings import Policy, is_glob, management_url
from celery_dlx.replay import Engine, Options, resume, start
from celery_dlx.signals import dead_letter_replayed, heard

if TYPE_CHECKING:
    from celery_dlx.brokers.rabbitmq.topology import RabbitMQTopology

POLICY_VARIABLE = "CELERY_DLX_POLICY"
#: Bootsteps by name: imported by workers only.
TOPOLOGY, CAPTURE = "celery_dlx.worker.steps:Topology", "celery_dlx.worker.steps:Capture"

#: Waiting for a result backend, in seconds.
_BACKEND_TIMEOUT = 2.0

_installed: WeakKeyDictionary[Any, DeadLetters] = WeakKeyDictionary()


class DeadLetters:
    """Dead letters of one Celery app: ``DeadLetters(app, policy="configs/shop.yaml")``.

    ``policy`` is a path, a `Policy`, or ``None``: then ``app.conf.dlx_policy`` is used, then the environment variable
    ``CELERY_DLX_POLICY``, then the built-in policy, which manages every task queue. Nothing is read, and no connection
    opened, before the app needs it.

    Raises:
        AlreadyInstalledError: the app has one already.
    """

    def __init__(self, app: Any, policy: str | Path | Policy | None = None) -> None:
        app = _unproxied(app)
        if app in _installed:
            raise AlreadyInstalledError(
                f"app {app.main!r} has DeadLetters already; construct it once, and use DeadLetters.of(app) elsewhere"
            )
        self.app = app
        self._given = policy
        self._policy: Policy | None = policy if isinstance(policy, Policy) else None
        self._broker: Broker | None = None
        self._choice: Choice | None = None
        #: Read also DLQs where the broker deletes what is looked at too often (RabbitMQ ≥ 4.0, made by others).
        self.insist = False
        #: Looking at large DLQs is for eyes only: see `celery_dlx.brokers.base.Looking`.
        self.looking: Looking | None = None
        self._cover = BrokerCover(lambda: self.policy)
        self._install()
        _installed[app] = self

    @staticmethod
    def of(app: Any) -> DeadLetters:
        """The DeadLetters of an app.

        Raises:
            NotInstalledError: it has none.
        """
        app = _unproxied(app)
        found = _installed.get(app)
        if found is None:
            raise NotInstalledError(
                f"app {app.main!r} has no DeadLetters; add `DeadLetters(app, policy=…)` where the app is made"
            )
        return found

    def _install(self) -> None:
        app = self.app
        app.add_defaults({"dlx_policy": None})
        install_redis_transport()
        app.amqp.queues_cls = queues_class(self._cover)
        if "queues" in app.amqp.__dict__:  # somebody looked already: those queues become covered ones too
            app.amqp.queues = app.amqp.Queues(dict(app.amqp.queues))
        app.steps["worker"].add(TOPOLOGY)
        app.steps["consumer"].add(CAPTURE)
        celeryd_init.connect(self._check_policy, weak=False)

    def _check_policy(self, instance: Any = None, **kwargs: Any) -> None:
        """A worker whose policy cannot be loaded must not start: its tasks would die silently."""
        if instance is not None and _unproxied(instance.app) is self.app:
            try:
                _ = self.policy
            except PolicyError as exc:
                sys.stderr.write(f"{exc}\n")
                raise SystemExit(exc.exit_code) from None

    # -- the policy

    @property
    def policy(self) -> Policy:
        """The policy in force, read at first use.

        Raises:
            PolicyError: it cannot be read, or everything that is wrong with it.
        """
        if self._policy is None:
            path = self._given or self._setting() or os.environ.get(POLICY_VARIABLE)
            if isinstance(path, Policy):
                self._policy = path
            elif path:
                from celery_dlx.policy.loader import load_policy  # pydantic: only when there is a file to read

                self._policy = load_policy(path)
            else:
                self._policy = Policy()
        return self._policy

    def _setting(self) -> Any:
        """`dlx_policy`, also from settings that came with a namespace (Django's `CELERY_DLX_POLICY`)."""
        conf = self.app.conf
        return conf.get("dlx_policy") or conf.get(POLICY_VARIABLE)

    # -- the letters

    @property
    def driver(self) -> str:
        """What kind of broker the app consumes from, in kombu's words: amqp, redis.

        Raises:
            UsageError: the broker URL cannot be used.
        """
        try:
            return str(self.app.connection_for_read().transport.driver_type)
        except KeyError as exc:
            raise UsageError(f"the broker URL cannot be used: {exc.args[0]}") from exc
        except (ValueError, TypeError):
            raise BrokerUrlError() from None

    @property
    def broker(self) -> Broker:
        """The dead-letter queues of the broker this app consumes from; connects when first asked for something."""
        if self._broker is None:
            connect = self.app.connection_for_read
            kind = self.driver
            # Clients are imported when they are needed: importing celery_dlx must stay cheap.
            if kind == "amqp":
                from celery_dlx.brokers.rabbitmq.frames import tolerant
                from celery_dlx.brokers.rabbitmq.store import RabbitMQBroker

                options = tolerant(self.app.conf.broker_transport_options)
                broker = RabbitMQBroker(
                    lambda: connect(transport_options=options), self.policy, self.known_queues, management_url(self.policy)
                )
                broker.insist = self.insist
                self._broker = broker
            elif kind == "redis":
                from celery_dlx.brokers.redis.broker import RedisBroker

                self._broker = RedisBroker(connect, self.policy)
            else:
                raise UnsupportedBrokerError(f"broker transport {kind!r}: expected RabbitMQ (amqp://) or Redis (redis://)")
        return self._broker

    @property
    def topology(self) -> RabbitMQTopology:
        """What RabbitMQ must hold for the policy: plan, apply, destroy; connects when first asked for something.

        Raises:
            UnsupportedBrokerError: the broker is not RabbitMQ. Redis needs nothing declared.
        """
        kind = self.driver
        if kind != "amqp":
            raise UnsupportedBrokerError(f"broker transport {kind!r}: only RabbitMQ has a topology; nothing to declare here")
        from celery_dlx.brokers.rabbitmq.topology import RabbitMQTopology

        url = management_url(self.policy)
        return RabbitMQTopology(self.app.connection_for_read, self.policy, self.known_queues, url)

    def close(self) -> None:
        """Close the connection that reading letters opened; the next call opens a new one."""
        self._let_go()
        if self._broker is not None:
            self._broker.close()
            self._broker = None

    def known_queues(self) -> list[str]:
        """Managed queues that the app or the policy names."""
        names = {identity(queue) for queue in self.app.amqp.queues.values()} | set(self.policy.named_queues())
        default = self.app.conf.task_default_queue
        if default:
            names.add(default)
        return sorted(name for name in names if self.policy.settings(name) is not None)

    def queues(self) -> list[str]:
        """Queues whose DLQ exists."""
        return self.broker.queues()

    def letters(
        self,
        queue: str | None = None,
        *,
        limit: int | None = None,
        newest: bool = False,
        after: str | None = None,
        **filters: Any,
    ) -> Iterator[DeadLetter]:
        """The dead letters of a queue, or of all, oldest first within each queue; nothing is removed.

        ``newest``: the newest first, of all queues together. ``after``: what comes after the letter with this id, such as
        the last one of the page before; what came or left meanwhile makes no difference.

        Filters (all must hold): ``ids``, ``task``, ``reason``, ``exception``, ``since``, ``until``; see
        `celery_dlx.selection.match`. A letter from Redis has no body here; `get` has.

        Raises:
            UnknownLetterError: there is no letter with the id given as ``after``.
        """
        matches, names = selection.match(**filters), self._queues(queue)
        pages = {name: matches.page(newest=newest) for name in names}
        if after is not None:
            home, died_at = self._locate(after, names)
            earlier = names[: names.index(home)]
            if newest:  # all queues together: of what died at once, that of earlier queues was seen already
                pages = {name: matches.page(newest=True, last=died_at - (name in earlier)) for name in names}
            else:
                pages = {name: page for name, page in pages.items() if name not in earlier}
            pages[home] = matches.page(newest=newest, after=after, died_at=died_at)
        if newest:
            found = (self._look(name, page, limit) for name, page in pages.items())
            return islice(merge(*found, key=lambda letter: -letter.died_at), limit)
        return islice((letter for name, page in pages.items() for letter in self._look(name, page, limit)), limit)

    def _look(self, queue: str, page: selection.Selection, limit: int | None) -> Iterator[DeadLetter]:
        return self.broker.browse(queue, page, limit, self.looking)

    def _locate(self, letter_id: str, names: list[str]) -> tuple[str, int]:
        page = selection.match(ids=[letter_id])
        for looking in (self.looking, None):  # one that came since may not be known
            for name in names:
                for letter in self.broker.browse(name, page, 1, looking):
                    return name, letter.died_at
            if looking is None:
                break
        raise self._unknown([letter_id], None)

    def groups(self, queue: str | None = None, **filters: Any) -> list[Group]:
        """The letters of a queue, or of all, by cause: the largest group first. Filters as for `letters`."""
        groups = Groups()
        matches = selection.match(**filters)
        for name in self._queues(queue):
            found = self.broker.groups(name, matches, self.looking)
            if found is not None:
                groups.merge(found)
                continue
            for _ in self._look(name, matches.each(groups.add), None):
                pass
        return groups.sorted()

    def _let_go(self) -> None:
        """Of a choice that nobody sent."""
        choice, self._choice = self._choice, None
        if choice is not None:
            choice.release()

    def choose(
        self, ids: str | Iterable[str] | None = None, queue: str | None = None, *, limit: int | None = None, **filters: Any
    ) -> Choice:
        """Choose letters to look at, and to replay then: see `celery_dlx.choice`. Filters as for `letters`."""
        ids = [ids] if isinstance(ids, str) else None if ids is None else list(ids)
        matches, text = selection.match(ids=ids, **filters), describe(queue, ids, filters)
        self._let_go()
        self._choice = Choice(self.broker, self.broker_name, self._queues(queue), matches, limit, text)
        return self._choice

    def start_replay(
        self,
        ids: str | Iterable[str] | None = None,
        queue: str | None = None,
        *,
        choice: Choice | None = None,
        limit: int | None = None,
        options: Options | None = None,
        hooks: Mapping[str, Any] | None = None,
        **filters: Any,
    ) -> tuple[Engine, QueueLocks]:
        """Select letters, as `choose` does or did, and journal that; running the engine (`celery_dlx.replay`) sends them."""
        chosen = choice or self.choose(ids, queue, limit=limit, **filters)
        return start(self.broker, self.broker_name, chosen, options or Options(), **(hooks or {}))

    def resume_replay(
        self,
        replay: str,
        hooks: Mapping[str, Any] | None = None,
        *,
        rate: float | None = None,
        wait: float | None = None,
    ) -> tuple[Engine, QueueLocks]:
        """Go on with a replay that was stopped or killed; ``rate`` and ``wait`` replace those it had."""
        self._let_go()
        return resume(self.broker, self.broker_name, replay, rate=rate, wait=wait, **(hooks or {}))

    @property
    def broker_name(self) -> str:
        """The broker's URL without its password: what journals go by."""
        return str(self.app.connection_for_read().as_uri())

    def get(self, letter_id: str, queue: str | None = None) -> DeadLetter:
        """One letter, with its message.

        Raises:
            UnknownLetterError: no queue has it.
        """
        for name in self._queues(queue):
            letter = self.broker.get(name, letter_id)
            if letter is not None:
                return letter
        raise self._unknown([letter_id], queue)

    def result_state(self, letter: DeadLetter) -> str | None:
        """What the result backend says of the letter's task; ``None`` if there is none that others can ask, or no answer."""
        task_id = letter.task_id
        if not task_id or type(self.app.backend).__name__ in ("DisabledBackend", "RPCBackend"):
            return None
        found: list[str] = []

        def ask() -> None:
            with suppress(Exception):  # every backend has errors of its own
                found.append(str(self.app.AsyncResult(task_id).state))

        # Aside: a backend that is gone is asked again and again, for minutes.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_BACKEND_TIMEOUT)
        return found[0] if found else None

    def replay(
        self,
        ids: str | Iterable[str] | None = None,
        queue: str | None = None,
        *,
        limit: int | None = None,
        **filters: Any,
    ) -> Iterator[Replayed]:
        """Send letters back to the queues they died in, at-least-once; yields each once it is there.

        Without ids, every letter that matches the filters, of a queue or of all. A letter leaves its DLQ only when the
        broker has its message: what is interrupted stays, or is in both places. Letters that die again meanwhile are
        not replayed again. On Redis what is yielded has no body, as from `letters`, unless ``bodies=True`` is given.

        Raises:
            UnknownLetterError: after all others were replayed, if an id was found nowhere.
            ReplayError: letters that the broker did not take; they are still in their DLQ.
        """

        def step(name: str, matches: Any, left: int | None) -> Iterator[Replayed]:
            for replayed in self.broker.replay(name, matches, left, Run(bodies=heard())):
                dead_letter_replayed.send(sender=None, letter=replayed.letter, queue=replayed.queue)
                yield replayed

        return self._each(step, ids, queue, limit, filters)

    def discard(
        self,
        ids: str | Iterable[str] | None = None,
        queue: str | None = None,
        *,
        limit: int | None = None,
        **filters: Any,
    ) -> Iterator[DeadLetter]:
        """Delete letters for good; yields each. Arguments as for `replay`."""
        return self._each(self.broker.discard, ids, queue, limit, filters)

    def export(self, queue: str, *, limit: int | None = None, **filters: Any) -> Iterator[dict[str, Any]]:
        """Letters of a queue as JSON-ready objects, byte for byte; `restore` takes them back. Filters as for `letters`."""
        return self.broker.export(queue, selection.match(**filters), limit)

    def restore(self, lines: Iterable[dict[str, Any]]) -> tuple[int, int]:
        """Store exported letters under their ids; returns how many, and how many were there already."""
        return self.broker.restore(lines)

    def purge(self, queue: str) -> int:
        """Delete all letters of a queue at once; returns how many there were."""
        return self.broker.purge(queue)

    def stats(self, queue: str | None = None) -> list[QueueStats]:
        """What each DLQ holds."""
        return list(self.broker.stats(self._queues(queue)))

    def _queues(self, queue: str | None) -> list[str]:
        if queue is None:
            return self.queues()
        return [name for name in self.queues() if fnmatchcase(name, queue)] if is_glob(queue) else [queue]

    def _each(self, step: Any, ids: Any, queue: str | None, limit: int | None, filters: dict[str, Any]) -> Iterator[Any]:
        if ids is not None:
            if filters:
                raise UsageError("expected either ids or filters, found both")
            ids = [ids] if isinstance(ids, str) else list(ids)
        return self._run_each(step, ids, queue, limit, selection.match(ids=ids, **filters))

    def _run_each(
        self, step: Any, ids: list[str] | None, queue: str | None, limit: int | None, matches: Any
    ) -> Iterator[Any]:
        missing, taken = set(ids or ()), 0
        for name in self._queues(queue):
            if ids is not None and not missing:
                break
            for outcome in step(name, matches, None if limit is None else limit - taken):
                missing.discard(getattr(outcome, "letter", outcome).id)
                taken += 1
                yield outcome
            if limit is not None and taken >= limit:
                break
        if missing and limit is None:
            raise self._unknown(sorted(missing), queue)

    def _unknown(self, ids: list[str], queue: str | None) -> UnknownLetterError:
        where = f"the DLQ of {queue!r}" if queue else f"the DLQs of {', '.join(self.queues()) or 'any queue'}"
        return UnknownLetterError(
            f"{where}: no letter {', '.join(ids)}; it was replayed, discarded or evicted, or lies in the DLQ of a queue "
            "this app does not name: give the queue"
        )


def _unproxied(app: Any) -> Any:
    return getattr(app, "_get_current_object", lambda: app)()

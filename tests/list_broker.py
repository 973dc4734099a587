"""A broker made of lists, and replays over it."""

from __future__ import annotations

from celery_dlx.brokers.base import Replayed
from celery_dlx.choice import Choice
from celery_dlx.letters import DeadLetter, Original
from celery_dlx.replay import Options, resume, start
from celery_dlx.selection import match


class Lists:
    """A broker whose workers report at once: ``outcome`` says what becomes of each letter."""

    def __init__(self, letters, outcome="succeeded"):
        self.dlq, self.outcome = list(letters), outcome
        self.queue, self.reports, self.fail_at = [], [], None
        #: What is found when letters are chosen, if that is not what is there later.
        self.found = None
        self.released = 0
        #: Whether somebody who was killed holds letters still.
        self.held = False

    def select(self, queue, match):
        return None

    def hold(self, queue, match, replay, limit=None):
        return None

    def release(self):
        self.released += 1

    def browse(self, queue, match=None, limit=None):
        return (
            letter
            for letter in list(self.dlq if self.found is None else self.found)
            if letter.queue == queue and match(letter)
        )

    def held_by_others(self, queue):
        return self.held

    def watch(self, replay):
        pass

    def outcomes(self, replay):
        reports, self.reports = self.reports, []
        return reports

    def discard(self, queue, match, limit=None):
        for letter in [letter for letter in self.dlq if match(letter)]:
            self.dlq.remove(letter)
            yield letter

    def replay(self, queue, match, limit=None, run=None):
        taken = 0
        for letter in list(self.dlq):
            if run.stop() or taken == limit:
                return
            if letter.queue != queue or not match(letter):
                continue
            taken += 1
            self.dlq.remove(letter)
            self.queue.append(letter.id)
            if self.fail_at == len(self.queue):
                raise ConnectionError("gone")
            if self.outcome:
                self.reports.append({"of": letter.id, "state": self.outcome, "fingerprint": letter.fingerprint})
            yield Replayed(letter, queue, [])


def letters(count, queue="q"):
    return [DeadLetter(f"{n:032x}", queue, f"{queue}.dlq", "failure", n, Original(), fingerprint="f") for n in range(count)]


def choice(broker):
    return Choice(broker, "redis://", ["q", "r"], match(), None, "all")


def run(broker, options=None, found=None, **hooks):
    broker.found = found
    engine, locks = start(broker, "redis://", choice(broker), options or Options(wait=0), **hooks)
    try:
        list(engine.run())
    finally:
        locks.release()
        engine.journal.close()
    return engine.record


def again(broker, replay):
    engine, locks = resume(broker, "redis://", replay)
    list(engine.run())
    locks.release()
    engine.journal.close()
    return engine.record


def counts(record):
    return {key: value for key, value in record.summary().items() if key != "replay"}

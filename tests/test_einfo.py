"""Failures on their way from a pool process to its worker."""

from __future__ import annotations

import logging
import pickle

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, signals
from celery.app.trace import build_tracer

from celery_dlx.worker.einfo import lighten, send_no_frames


@pytest.fixture
def traced(caplog):
    """Runs a task as a pool process does: what it would send, and what listeners saw."""
    send_no_frames()
    app = Celery("traced", set_as_current=False)
    app.conf.task_ignore_result = True

    @app.task(bind=True, name="fails", shared=False)
    def fails(self, retry):
        raise self.retry(exc=ValueError("not yet"), countdown=1, throw=True) if retry else ValueError("never")

    app.finalize()
    fails.signature_from_request = lambda *args, **kwargs: type("S", (), {"apply_async": lambda self: None})()
    seen = []

    def hear(einfo=None, **_):
        seen.append(einfo)

    signals.task_failure.connect(hear)
    signals.task_retry.connect(hear)

    def run(retry=False):
        request = {
            "id": "1",
            "task": "fails",
            "delivery_info": {},
            "is_eager": False,
            "called_directly": False,
            "retries": 0,
        }
        with caplog.at_level(logging.INFO):
            build_tracer("fails", fails, app=app)("1", (retry,), {}, request)
        return seen[-1]

    yield run
    for signal in (signals.task_failure, signals.task_retry):
        signal.disconnect(hear)
        signal.disconnect(lighten)


@pytest.mark.parametrize("retry", [False, True])
def test_all_but_the_frames_arrives(traced, retry):
    einfo = traced(retry)
    assert einfo.tb is not None, "here it is as ever"
    there = pickle.loads(pickle.dumps(einfo))  # noqa: S301 - our own, as between a pool process and its worker
    assert type(there) is ExceptionInfo
    assert there.tb is None
    assert there.traceback == einfo.traceback and "test_einfo.py" in there.traceback
    assert (there.type, there.internal) == (einfo.type, einfo.internal)
    assert str(there.exception) == str(einfo.exception if not retry else einfo.exception.exc)
    assert there.exc_info == (einfo.type, there.exception, None)
    assert len(pickle.dumps(einfo)) < 2_500 < len(pickle.dumps(einfo.tb))


def test_a_log_of_the_pool_process_shows_the_traceback(traced, caplog):
    traced()
    assert "raise self.retry(" in caplog.text and "ValueError: never" in caplog.text


def test_failures_without_one_are_left_alone():
    lighten(sender=None, einfo=None)
    other = type("Other", (ExceptionInfo,), {})((ValueError, ValueError("x"), _traceback()))
    lighten(einfo=other)
    assert type(other).__name__ == "Other"


def _traceback():
    try:
        raise ValueError
    except ValueError as exc:
        return exc.__traceback__

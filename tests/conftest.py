"""What all pure tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _state(monkeypatch, tmp_path):
    """Journals are the test's own."""
    monkeypatch.setenv("CELERY_DLX_STATE", str(tmp_path))

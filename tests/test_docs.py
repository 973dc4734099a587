"""What the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_promises_name_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/guarantees.md").read_text("utf-8")))
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "integration").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", code, re.MULTILINE))
    assert named and named <= defined, named - defined

"""What a preflight keeps of what it finds."""

from __future__ import annotations

from celery_dlx.preflight import _MOST_KINDS, Doubt, Findings


def test_findings_are_counted_by_what_they_say():
    findings = Findings()
    for number in range(5):
        findings.add(Doubt(f"id{number}", "q", "not registered", True))
        findings.add(Doubt(f"id{number}", "q", "does not fit", True))
    findings.add(Doubt("late", "q", "it waits", False))
    assert {message: (found.letter, found.letters) for message, found in findings.kinds.items()} == {
        "not registered": ("id0", 5),
        "does not fit": ("id0", 5),
        "it waits": ("late", 1),
    }
    assert findings.sure == 5, "letters, not doubts"


def test_findings_of_a_million_letters_take_no_more_memory():
    findings = Findings()
    for number in range(3 * _MOST_KINDS):
        findings.add(Doubt(f"id{number}", "q", f"it waits for {number}", number % 2 == 0))
    assert len(findings.kinds) == _MOST_KINDS and findings.sure == 3 * _MOST_KINDS // 2


def test_a_letter_with_an_empty_id_counts_as_any_other():
    findings = Findings()
    for _ in range(2):
        findings.add(Doubt("", "q", "not registered", True))
    assert findings.sure == 1

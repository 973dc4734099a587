"""A short run of the fuzzer for each broker. `make fuzz` makes long ones."""

from __future__ import annotations

import os

from faults.fuzz import Fuzz

SEED = int(os.environ.get("DLX_SEED", "20261120"))


def test_no_message_and_no_letter_does_harm(broker):
    account = Fuzz(broker, SEED, messages=400, letters=60, shown=20).run()
    report = [*account.lost[:5], *account.altered[:5], *account.worker, *account.tools, account.as_dict()]
    assert account.good, report
    assert account.executed > 100 and account.letters > 100, report
    print(account.as_dict())

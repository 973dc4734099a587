"""A short storm for each broker. `make soak` runs long ones."""

from __future__ import annotations

import os

from faults.storm import FAULTS, Storm

SEED = int(os.environ.get("DLX_SEED", "20261120"))


def test_nothing_is_lost_in_a_storm(broker, queue):
    storm = Storm(broker, queue, SEED, messages=3_000, faults=14)
    account = storm.run()
    assert sum(account.faults.values()) == 14 and set(account.faults) == set(FAULTS), "the faults happened"
    assert storm.proxy.broken > 0 and account.idle == 0, f"there was work under way at each: {account.as_dict()}"
    assert (account.lost, account.wrong) == (set(), set()), account.as_dict()
    print(account.as_dict())

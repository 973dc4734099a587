"""A short storm with failovers. `make soak` runs long ones."""

from __future__ import annotations

import os

from faults.failover_faults import FAILOVER_FAULTS, FailoverStorm

SEED = int(os.environ.get("DLX_SEED", "20261120"))


def test_nothing_is_lost_when_the_master_fails_over_in_a_storm(watched, queue):
    account = FailoverStorm(watched, queue, SEED, messages=1_200, faults=len(FAILOVER_FAULTS)).run()
    assert set(account.faults) == set(FAILOVER_FAULTS), "each fault happened, as it asserts itself"
    assert account.idle == 0, f"there was work under way at each: {account.as_dict()}"
    assert (account.lost, account.wrong) == (set(), set()), account.as_dict()
    print(account.as_dict())

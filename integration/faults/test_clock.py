"""A clock that jumps by an hour: Redis tells by its own what is overdue. Workers and RabbitMQ go by monotonic ones."""

from __future__ import annotations

import os

from faults.clock_faults import CLOCK_FAULTS, ClockStorm

SEED = int(os.environ.get("DLX_SEED", "20261120"))


def test_nothing_is_lost_when_the_servers_clock_jumps(redis_server, queue):
    account = ClockStorm(redis_server, queue, SEED, messages=1_200, faults=8).run()
    assert set(account.faults) == set(CLOCK_FAULTS), "each fault happened, as it asserts itself"
    assert account.idle == 0, f"there was work under way at each: {account.as_dict()}"
    assert (account.lost, account.wrong) == (set(), set()), account.as_dict()
    print(account.as_dict())

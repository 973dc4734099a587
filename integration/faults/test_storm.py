"""Short storms for each broker. `make soak` runs long ones."""

from __future__ import annotations

import os

from faults.broker_faults import BROKER_FAULTS, BrokerStorm
from faults.replay_road import REPLAY_FAULTS, ReplayStorm
from faults.storm import FAULTS, Storm

SEED = int(os.environ.get("DLX_SEED", "20261120"))


def test_nothing_is_lost_in_a_storm(broker, queue):
    storm = Storm(broker, queue, SEED, messages=3_000, faults=14)
    account = storm.run()
    assert sum(account.faults.values()) == 14 and set(account.faults) == set(FAULTS), "the faults happened"
    assert storm.proxy.broken > 0 and account.idle == 0, f"there was work under way at each: {account.as_dict()}"
    assert (account.lost, account.wrong) == (set(), set()), account.as_dict()
    print(account.as_dict())


def test_nothing_is_lost_when_the_broker_fails(broker, queue):
    kinds = BROKER_FAULTS[broker.kind]
    account = BrokerStorm(broker, queue, SEED, messages=1_000, faults=len(kinds), kills=True, task_seconds=0.08).run()
    assert set(account.faults) - {"killed_meanwhile"} == set(kinds), "each fault happened, as it asserts itself"
    assert account.idle == 0, f"there was work under way at each: {account.as_dict()}"
    assert (account.lost, account.wrong) == (set(), set()), account.as_dict()
    print(account.as_dict())


def test_nothing_is_lost_when_a_replay_is_killed(broker, queue):
    storm = ReplayStorm(broker, queue, SEED, messages=400, faults=6, kinds=("kill_tool", "kill_tool", *REPLAY_FAULTS))
    account = storm.run()
    assert set(account.faults) == set(REPLAY_FAULTS) and account.idle == 0, account.as_dict()
    assert (account.lost, account.wrong) == (set(), set()), account.as_dict()
    print(account.as_dict())

"""A short storm over a cluster. `make soak` runs long ones."""

from __future__ import annotations

import os

import pytest
from clusters import Cluster
from faults.cluster_faults import CLUSTER_FAULTS, ClusterStorm

SEED = int(os.environ.get("DLX_SEED", "20261120"))


@pytest.fixture
def cluster():
    found = Cluster().start()
    yield found
    found.stop()


def test_nothing_is_lost_when_members_of_a_cluster_fail(cluster, queue):
    account = ClusterStorm(cluster, queue, SEED, messages=900, faults=len(CLUSTER_FAULTS)).run()
    assert set(account.faults) == set(CLUSTER_FAULTS), "each fault happened, as it asserts itself"
    assert account.idle == 0, f"there was work under way at each: {account.as_dict()}"
    assert (account.lost, account.wrong) == (set(), set()), account.as_dict()
    print(account.as_dict())

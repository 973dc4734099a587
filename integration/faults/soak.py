"""Long storms: ``make soak SOAK="--rounds 10 --faults 100 --messages 20000 --seed N --only redis --kills"``.

``--broker-faults``: the broker's own faults instead of the workers' (with ``--kills``: workers are killed meanwhile);
``--replay``: a replay that is killed and resumed again and again; ``--cluster``: members of a RabbitMQ cluster of three die,
or lose sight of each other; ``--failover``: a Redis master is killed, and its replica takes over.

Each round is a storm of its own, on brokers of its own. Prints a line per round and a table; exit 1 if anything was lost
or wrongly dead-lettered, with the seed that shows it again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parent.parent))

from clusters import Cluster
from faults.broker_faults import BROKER_FAULTS, BrokerStorm
from faults.cluster_faults import CLUSTER_FAULTS, ClusterStorm
from faults.failover_faults import FAILOVER_FAULTS, FailoverStorm
from faults.replay_road import REPLAY_FAULTS, ReplayStorm
from faults.storm import FAULTS, KILLS, Storm
from servers import start_broker
from watched import Watched


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=["rabbitmq", "redis"])
    parser.add_argument("--kills", action="store_true", help="kills alone, no frozen or cut-off workers")
    road = parser.add_mutually_exclusive_group()
    road.add_argument("--broker-faults", action="store_true", help="the broker fails; with --kills, workers are killed, too")
    road.add_argument("--replay", action="store_true", help="the replaying tool and workers are killed")
    road.add_argument("--cluster", action="store_true", help="members of a RabbitMQ cluster fail")
    road.add_argument("--failover", action="store_true", help="masters of Redis fail, watched by a Sentinel")
    options = parser.parse_args()
    rows, bad, names = [], 0, _names(options)
    only = "rabbitmq" if options.cluster else "redis" if options.failover else options.only
    for kind in [only] if only else ["rabbitmq", "redis"]:
        broker = Cluster().start() if options.cluster else Watched().start() if options.failover else start_broker(kind)
        faults: Counter = Counter()
        total: Counter = Counter()
        try:
            for turn in range(options.rounds):
                seed = options.seed + turn
                account = _storm(options, broker, seed).run()
                print(json.dumps({"broker": kind, **account.as_dict()}), flush=True)
                faults.update(account.faults)
                total.update(messages=account.messages, lost=len(account.lost), wrong=len(account.wrong))
                total.update(duplicates=account.duplicates, idle=account.idle)
                bad += len(account.lost) + len(account.wrong)
        finally:
            broker.stop()
        rows.append([kind, *(str(faults[name]) for name in names), *(str(total[name]) for name in _TOTALS)])
    for row in [["broker", *names, *_TOTALS], *rows]:
        print("  ".join(cell.rjust(max(11, *map(len, names))) for cell in row))
    return 1 if bad else 0


def _storm(options: argparse.Namespace, broker, seed: int) -> Storm:
    common = broker, f"q{uuid4().hex[:10]}", seed, options.messages, options.faults
    if options.broker_faults:
        return BrokerStorm(*common, kills=options.kills)
    if options.cluster:
        return ClusterStorm(*common)
    if options.failover:
        return FailoverStorm(*common)
    return ReplayStorm(*common) if options.replay else Storm(*common, KILLS if options.kills else FAULTS)


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    if options.broker_faults:
        return (*dict.fromkeys(name for names in BROKER_FAULTS.values() for name in names), "killed_meanwhile")
    if options.cluster:
        return CLUSTER_FAULTS
    if options.failover:
        return FAILOVER_FAULTS
    return REPLAY_FAULTS if options.replay else FAULTS


_TOTALS = ("messages", "lost", "wrong", "duplicates", "idle")

if __name__ == "__main__":
    sys.exit(main())

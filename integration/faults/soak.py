"""Long storms: ``make soak SOAK="--rounds 10 --faults 100 --messages 20000 --seed N --only redis --kills"``.

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

from faults.storm import FAULTS, KILLS, Storm
from servers import start_broker


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=["rabbitmq", "redis"])
    parser.add_argument("--kills", action="store_true", help="kills alone, no frozen or cut-off workers")
    options = parser.parse_args()
    rows, bad = [], 0
    for kind in [options.only] if options.only else ["rabbitmq", "redis"]:
        broker = start_broker(kind)
        faults: Counter = Counter()
        total: Counter = Counter()
        try:
            for turn in range(options.rounds):
                seed = options.seed + turn
                storm = Storm(broker, f"q{uuid4().hex[:10]}", seed, options.messages, options.faults,
                              KILLS if options.kills else FAULTS)  # fmt: skip
                account = storm.run()
                print(json.dumps({"broker": kind, **account.as_dict()}), flush=True)
                faults.update(account.faults)
                total.update(messages=account.messages, lost=len(account.lost), wrong=len(account.wrong))
                total.update(duplicates=account.duplicates, idle=account.idle)
                bad += len(account.lost) + len(account.wrong)
        finally:
            broker.stop()
        rows.append([kind, *(str(faults[name]) for name in FAULTS), *(str(total[name]) for name in _TOTALS)])
    for row in [["broker", *FAULTS, *_TOTALS], *rows]:
        print("  ".join(cell.rjust(11) for cell in row))
    return 1 if bad else 0


_TOTALS = ("messages", "lost", "wrong", "duplicates", "idle")

if __name__ == "__main__":
    sys.exit(main())

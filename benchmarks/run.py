"""Starts private brokers and runs all benchmarks over them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "integration"))

import servers  # noqa: E402


def main() -> None:
    brokers = [servers.RabbitMQ().start(), servers.Redis().start()]
    urls = [argument for broker in brokers for argument in ("--broker", broker.url)]
    try:
        for script, *more in (["startup.py", "--rounds", "3"], ["capture.py", "--rounds", "3", *sys.argv[1:]]):
            subprocess.run([sys.executable, str(HERE / script), *urls, *more], check=True)
    finally:
        for broker in brokers:
            broker.stop()
    for script in ("transport.py", "letters.py"):  # they start what they need
        subprocess.run([sys.executable, str(HERE / script)], check=True)


if __name__ == "__main__":
    main()

"""Storms over a RabbitMQ cluster: the leader of the queue or of its DLQ is killed, or loses sight of the others."""

from __future__ import annotations

from clusters import Cluster
from faults.storm import Storm
from raw import Sender

CLUSTER_FAULTS = ("kill_leader", "kill_dlq_leader", "part_leader", "part_dlq_leader")


class ClusterStorm(Storm):
    """Source queue and DLQ are quorum queues with a copy on each node; workers and tools know all nodes."""

    extra = "type: quorum, "

    def __init__(self, cluster: Cluster, queue: str, seed: int, messages: int, faults: int, kinds=CLUSTER_FAULTS) -> None:
        # Slow tasks: it takes seconds to find out who leads, and there is to be work under way when it dies.
        super().__init__(cluster, queue, seed, messages, faults, kinds, task_seconds=0.2)
        self.cluster = cluster
        self._sent = 0

    def _publish(self) -> None:
        """A share now and one before each step: recovering takes long, too."""
        sender, share = Sender(self.cluster.url), self.messages // (2 * len(self.plan) + 1)
        for number in range(self._sent, min(self._sent + share, self.messages)):
            sender.task(self.queue, self.task_of(number), [number])
            self._sent += 1

    def _busy(self) -> bool:
        return len(self._done()) < sum(1 for number in range(self._sent) if number not in self._bad)

    def _progress(self) -> None:
        self._publish()
        super()._progress()

    def _settle(self) -> None:
        self._publish()
        assert self._sent == self.messages
        super()._settle()

    def _begin(self) -> None:
        for name in (self.queue, f"{self.queue}.dlq"):
            assert self.cluster.members(name) == Cluster.SIZE, f"{name} has a copy on each node"

    def _kill_leader(self, worker) -> None:
        self._kill_leader_of(self.queue)

    def _kill_dlq_leader(self, worker) -> None:
        self._kill_leader_of(f"{self.queue}.dlq")

    def _kill_leader_of(self, name: str) -> None:
        node = self.cluster.leader(name)
        node.crash()
        assert self.cluster.leader(name) is not node, "another one leads"
        self._progress()  # with two of three
        node.run()
        self.cluster.wait_whole()

    def _part_leader(self, worker) -> None:
        self._part_leader_of(self.queue)

    def _part_dlq_leader(self, worker) -> None:
        self._part_leader_of(f"{self.queue}.dlq")

    def _part_leader_of(self, name: str) -> None:
        node = self.cluster.leader(name)
        try:
            self.cluster.part(node)
            assert self.cluster.leader(name) is not node, "another one leads"
            self._progress()
        finally:
            self.cluster.heal(node)

"""RabbitMQ clusters of local nodes, whose members die and lose sight of each other."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from servers import RabbitMQ, wait_for

#: A member that sees only a minority stops, as operators of clusters are advised
#: (https://www.rabbitmq.com/docs/partitions#pause-minority).
_SETTINGS = "cluster_partition_handling = pause_minority\n"


class Cluster:
    """Three nodes. ``url`` names them all, as applications do."""

    kind = "rabbitmq"
    SIZE = 3

    def __init__(self) -> None:
        first = RabbitMQ(settings=_SETTINGS)
        self.nodes = [first, *(RabbitMQ(beside=first, settings=_SETTINGS) for _ in range(self.SIZE - 1))]

    @property
    def url(self) -> str:
        return ";".join(node.url for node in self.nodes)

    def start(self) -> Cluster:
        first, *others = self.nodes
        first.start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(RabbitMQ.start, others))
        for node in others:
            for step in (["stop_app"], ["join_cluster", first.node], ["start_app"]):
                node.ctl(*step)
        self.wait_whole()
        return self

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.process is not None and node.process.poll() is None:
                node.crash()  # its data is thrown away: nothing to take leave of
            node.stop()

    def running(self, seen_by: RabbitMQ) -> set[str]:
        """The members that one of them sees; none while it is paused."""
        status = json.loads(seen_by.ctl("cluster_status", "--formatter", "json"))
        return set(status["running_nodes"])

    def wait_whole(self) -> None:
        """All see each other again."""
        names = {node.node for node in self.nodes}

        def whole() -> bool:
            try:
                return all(self.running(node) == names for node in self.nodes)
            except RuntimeError:
                return False  # one is starting, or paused

        wait_for(whole, lambda: f"the cluster is whole: {[self.running(node) for node in self.nodes]}", 120, every=0.5)

    def leader(self, queue: str) -> RabbitMQ:
        """The node that leads a quorum queue, as the others know it; there is one again soon after the last one died."""

        def found() -> RabbitMQ | None:
            for node in self.nodes:
                try:
                    listed = json.loads(node.ctl("list_queues", "name", "leader", "--online", "--formatter", "json"))
                except RuntimeError:
                    continue  # this one is down
                for row in listed:
                    if row["name"] == queue:
                        return next((each for each in self.nodes if each.node == row["leader"]), None)
            return None

        return wait_for(found, f"queue {queue!r} has a leader", 60)

    def members(self, queue: str) -> int:
        """How many nodes hold a copy of a quorum queue."""
        listed = json.loads(self.nodes[0].ctl("list_queues", "name", "members", "--formatter", "json"))
        return next(len(row["members"]) for row in listed if row["name"] == queue)

    def part(self, node: RabbitMQ) -> None:
        """The others and this node do not see each other any more; its clients still do."""
        # With another cookie neither accepts the other's connection. All at once: where one of the others is still seen,
        # RabbitMQ calls the partition partial and pauses more than the minority.
        others = ",".join(f"'{each.node}'" for each in self.nodes if each is not node)
        node.ctl(
            "eval", f"[erlang:set_cookie(N, parted) || N <- [{others}]], [erlang:disconnect_node(N) || N <- [{others}]]."
        )
        majority = next(each for each in self.nodes if each is not node)
        wait_for(lambda: node.node not in self.running(majority), f"{node.node} is out of sight", 30)

    def heal(self, node: RabbitMQ) -> None:
        others = ",".join(f"'{each.node}'" for each in self.nodes if each is not node)
        node.ctl("eval", f"[erlang:set_cookie(N, erlang:get_cookie()) || N <- [{others}]].")
        self.wait_whole()

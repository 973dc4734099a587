"""A TCP proxy between workers and their broker that can be told to misbehave."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading


class Proxy:
    """Forwards to ``port`` on this machine."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        #: How often a connection was broken.
        self.broken = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                broker = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                client.close()
                continue
            for sock in (client, broker):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = client, broker
            with self._lock:
                self._pairs.add(pair)
            threading.Thread(target=self._pump, args=(client, broker, pair), daemon=True).start()
            threading.Thread(target=self._pump, args=(broker, client, pair), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                target.sendall(data)
        self._close(pair)

    def _close(self, pair: tuple[socket.socket, socket.socket], reset: bool = False) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            self._pairs.discard(pair)
        for sock in pair:
            with contextlib.suppress(OSError):
                if reset:  # no lingering: the peer gets RST, and what was under way is lost
                    # A thread that waits in `recv` keeps the socket open, and the peer would wait for good.
                    sock.shutdown(socket.SHUT_RD)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def cut(self, reset: bool = False) -> None:
        """Break every connection, with FIN or with RST."""
        with self._lock:
            pairs = list(self._pairs)
        self.broken += len(pairs)
        for pair in pairs:
            self._close(pair, reset)

    def stall(self) -> None:
        """Forward nothing; connections stay open."""
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    def close(self) -> None:
        self._server.close()
        self.flow()
        self.cut()

"""A good client beside thousands that are not."""

import os
import socket
import struct
import threading
import time

from tools import export, fio, median

SIZE_MIB = 256
CONNECTIONS, QUICK_CONNECTIONS = 10_000, 3_000
SECONDS = 5
CLIENT_FLAGS = struct.pack(">I", 3)
OPTION = b"IHAVEOPT" + struct.pack(">II", 3, 0)


def silent(_peer):
    """Says nothing at all."""


def garbage(peer):
    peer.sendall(os.urandom(512))


def half_open(peer):
    """Stops in the middle of an option."""
    peer.sendall(CLIENT_FLAGS + OPTION[:11])


def endless(peer):
    """Announces more than anybody takes, and begins to send it."""
    peer.sendall(CLIENT_FLAGS + b"IHAVEOPT" + struct.pack(">II", 6, 0xFFFF_FFF0) + bytes(2000))


def slow(peer):
    peer.sendall(CLIENT_FLAGS[:1])


KINDS = (silent, garbage, half_open, endless, slow)


class Crowd:
    """Makes so many connections in the time of a measurement, evenly, and keeps the last thousand open."""

    def __init__(self, port, connections):
        self.port, self.connections, self.made, self.stopping = port, connections, 0, False
        self.thread = threading.Thread(target=self.run)

    def run(self):
        began, kept = time.monotonic(), []
        while not self.stopping and self.made < self.connections:
            due = (time.monotonic() - began) / SECONDS * self.connections
            while self.made < min(due, self.connections):
                try:
                    peer = socket.create_connection(("127.0.0.1", self.port))
                    kept.append(peer)
                    KINDS[self.made % len(KINDS)](peer)
                except OSError:
                    # Turned out before it had said its piece.
                    pass
                self.made += 1
            while len(kept) > 1000:
                kept.pop(0).close()
            time.sleep(0.002)
        while not self.stopping:
            time.sleep(0.01)
        for peer in kept:
            peer.close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping = True
        self.thread.join()


class Bystander:
    """Somebody else's server, for the control: it takes everybody in and hears nobody. What the crowd costs there, the
    machine pays for the crowd itself."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        kept = []
        while True:
            try:
                kept.append(self.listener.accept()[0])
            except OSError:
                return
            while len(kept) > 256:
                kept.pop(0).close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def speed(address):
    return fio("--ioengine=nbd", f"--uri=nbd://{address}/", "--rw=randread", "--bs=4k", "--iodepth=32",
               f"--size={SIZE_MIB}m", "--norandommap", "--time_based", f"--runtime={SECONDS}")["iops"]


def tables(bench):
    connections = QUICK_CONNECTIONS if bench.quick else CONNECTIONS
    runs = {"alone": [], "beside a crowd at another server": [], "beside a crowd at this export": []}
    made = []
    with export(bench, bench.noise(SIZE_MIB)) as (address, _):
        port = int(address.rsplit(":", 1)[1])
        for _ in range(bench.rounds):
            runs["alone"].append(speed(address))
            with Bystander() as other, Crowd(other.port, connections):
                runs["beside a crowd at another server"].append(speed(address))
            with Crowd(port, connections) as crowd:
                runs["beside a crowd at this export"].append(speed(address))
            made.append(crowd.made)
    alone = median(runs["alone"])
    elsewhere = median(runs["beside a crowd at another server"])
    rows = [
        {"a good client": name, "IOPS": median(each), "÷ alone": median(each) / alone,
         "÷ crowd elsewhere": median(each) / elsewhere, "runs_iops": each}
        for name, each in runs.items()
    ]
    yield (
        f"4 KiB random reads of an export, depth 32, while {connections} connections are made that are silent, half open, "
        f"slow, endless or garbage ({min(made)} at least were made); wanted: ≥ 0.8 of what is left beside a crowd at "
        "another server", rows,
    )

"""Replicas in processes of their own that kill or stop themselves at a chosen step. As a program this is their nursery.

A step is one message that a replica sends or takes, or one piece of a copy. The nursery has everything imported and
forks a replica in well under a second; it ends with the process that started it, and its replicas with it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from protocol.link import LinkTimings
from protocol.membership import Member, ReplicaRole
from tests.integration.worker_cluster import SECRET
from transfer.transport import TransferTimings

SILENCE_S = 2.0
"""After which a stopped replica is given up here; it is five seconds elsewhere."""
_PR_SET_PDEATHSIG = 1
_WAIT_S = 60.0


class ReplicaOrder(msgspec.Struct, frozen=True):
    """What a replica is to be, and after how many steps it strikes itself with which signal; 0: never."""

    role: ReplicaRole
    folder: str
    transport: str
    shared_folder: str
    """That `disk` goes through; else empty."""
    step: int
    signal: int


class Nursery:
    """Forks replicas. `close` ends it and them."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = Path(__file__).parents[2]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.worker_processes", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
                cwd=root,
            )

    def fork(self, order: ReplicaOrder) -> ReplicaProcess:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_WAIT_S)
        with theirs:
            socket.send_fds(self._sock, [msgspec.json.encode(order)], [theirs.fileno()])
        pid = int(self._sock.recv(64))
        return ReplicaProcess(pid, ours)

    def close(self) -> None:
        self._sock.close()
        self._process.kill()
        self._process.wait(_WAIT_S)


class ReplicaProcess:
    """One replica; `close` kills it."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pidfd = os.pidfd_open(pid)
        self._pid = pid
        self._sock = sock
        self.member = msgspec.json.decode(sock.recv(4096), type=Member)

    @property
    def is_dead(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    @property
    def is_stopped(self) -> bool:
        return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def dies(self) -> bool:
        """Whether it is dead, or soon will be: its sockets are closed a moment before."""
        return bool(select.select([self._pidfd], [], [], _WAIT_S)[0])

    def resume(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def settles(self) -> bool:
        """Whether it lives, no room is open there any more, and its books balance with nothing held."""
        try:
            self._sock.send(b"?")
            return self._sock.recv(16) == b"yes"
        except ConnectionError:
            return False

    def close(self) -> None:
        if not self.is_dead:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            assert select.select([self._pidfd], [], [], _WAIT_S)[0]
        os.close(self._pidfd)
        self._sock.close()


def find_silence_sooner(patch: dict[str, object] = LinkTimings.__init__.__kwdefaults__) -> None:
    """In this process, for the links that are made from now on."""
    patch.update(ping_s=SILENCE_S / 8, silence_s=SILENCE_S)


def wait_for_groups(patch: dict[str, object] = TransferTimings.__init__.__kwdefaults__) -> None:
    """In this process, copies wait for their process group, however slow the machine is to make one."""
    patch.update(patience_s=_WAIT_S)


# ---- in the other process -----------------------------------------------------------------------------------------


def strike_at(step: int, number: int) -> None:
    """Have this process send itself signal `number` right before its `step`th step."""
    from cluster.peer_links import PeerLinks
    from protocol.rooms import StepFrame
    from transfer.landing import Landing

    steps = 0
    deliver, received, before = PeerLinks.deliver, PeerLinks.received, Landing.before

    def count(message: object = None) -> None:
        nonlocal steps
        if not isinstance(message, StepFrame) or message.tokens:
            steps += 1
            if steps == step:
                os.kill(os.getpid(), number)

    def count_sent(self, outgoing):
        for link_id, message in outgoing:
            count(message)
            deliver(self, [(link_id, message)])

    def count_received(self, link, message):
        count(message)
        received(self, link, message)

    def count_pieces(self, copy, transport):
        count()
        before(self, copy, transport)

    PeerLinks.deliver, PeerLinks.received, Landing.before = count_sent, count_received, count_pieces


async def serve(order: ReplicaOrder, sock: socket.socket) -> None:
    """Be the replica until the other end of `sock` is closed."""
    from cluster.worker import ReplicaWorker, TransferOptions, WorkerConfig
    from engine.config import EngineConfig

    worker = ReplicaWorker(
        WorkerConfig(
            replica_id=f"{order.role.value}-mortal",
            role=order.role,
            model_path=Path(order.folder),
            engine=EngineConfig(max_total_tokens=1024, chunked_prefill_size=32),
            secret=SECRET,
            dtype="float32",
            transfer=TransferOptions(
                transport=order.transport, folder=Path(order.shared_folder) if order.shared_folder else None
            ),
        )
    )
    member = await worker.start()
    sock.send(msgspec.json.encode(member))
    sock.setblocking(False)
    while await asyncio.get_running_loop().sock_recv(sock, 1):
        async with asyncio.timeout(_WAIT_S):
            while not (await worker.is_idle() and (await worker.audit()).idle):
                pass  # each question waits for a pass of the engine thread
        sock.send(b"yes")


def main() -> None:
    import cluster.worker  # noqa: F401  what takes long

    sock = socket.socket(fileno=int(sys.argv[1]))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    find_silence_sooner()
    wait_for_groups()
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 4096, 1)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            sock.close()
            order = msgspec.json.decode(data, type=ReplicaOrder)
            strike_at(order.step, order.signal)
            asyncio.run(serve(order, socket.socket(fileno=fds[0])))
            os._exit(0)
        os.close(fds[0])
        sock.send(str(pid).encode())


if __name__ == "__main__":
    main()

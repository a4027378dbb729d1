"""Peers that lie, babble, hang or do not know the secret: they get nothing, change nothing, and hold up nobody."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_pools import SECRET, FakeClock, Receiver, ServedPool, closing

from protocol.handshake import new_nonce
from transfer.transport import TransferTimings
from transfer.wire import (
    GREETING_BYTES,
    HELLO_BYTES,
    WELCOME_BYTES,
    Status,
    Want,
    Welcome,
    WireError,
    connection_key,
    decode_greeting,
    decode_hello,
    decode_welcome,
    encode_greeting,
    encode_hello,
    encode_welcome,
)
from transfer.wire_requests import (
    REPLY_BYTES,
    REQUEST_BYTES,
    Reply,
    decode_reply,
    decode_request_head,
    decode_runs,
    encode_reply,
    encode_request,
)

PAGE = 4096


@pytest.fixture
def pool():
    with closing(ServedPool(boot=7)) as (pool,):
        yield pool


def connect(pool, *, unix=False):
    if unix:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + pool.ticket.shm_socket)
    else:
        sock = socket.create_connection((pool.ticket.tcp_host, pool.ticket.tcp_port))
    sock.settimeout(30)
    return sock


def receive(sock, count):
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError(f"closed after {len(data)} of {count} bytes")
        data += more
    return data


def is_closed(sock):
    """Whether the other side closed the connection, after whatever it still had to say."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
    return True


class Client:
    """Knows the secret, but not necessarily how to behave."""

    def __init__(self, pool, *, secret=SECRET, boot=7, want=Want.PAGES, unix=False):
        self.sock = connect(pool, unix=unix)
        server_nonce, nonce = decode_greeting(receive(self.sock, GREETING_BYTES)), new_nonce()
        self.sock.sendall(encode_hello(secret, server_nonce, want=want, boot=boot, nonce=nonce))
        self.key = connection_key(secret, server_nonce, nonce)
        self.nonces = server_nonce, nonce

    def welcome(self):
        return decode_welcome(receive(self.sock, WELCOME_BYTES), SECRET, *self.nonces)

    def ask(self, runs, *, job=1, boot=7, page_bytes=PAGE):
        self.sock.sendall(encode_request(self.key, boot=boot, job=job, runs=runs, page_bytes=page_bytes))

    def reply(self):
        return decode_reply(self.key, receive(self.sock, REPLY_BYTES))

    def close(self):
        self.sock.close()


def assert_still_serving(pool):
    for transport in ("shm", "tcp"):
        with closing(Receiver(transport=transport)) as (receiver,):
            receiver.fetcher.attach(pool.address, pool.ticket)
            assert receiver.fetch(pool.address, [3], [4], checksums=pool.checksums([3])).ok


# ---- clients of a server --------------------------------------------------------------------------------------


@pytest.mark.parametrize("unix", [False, True])
@pytest.mark.parametrize(
    "babble", [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n" * 10, b"PDKV" + bytes(200), b"\xff" * 100_000]
)
def test_babble_closes_the_connection_and_nothing_else(pool, unix, babble):
    with connect(pool, unix=unix) as sock:
        with contextlib.suppress(OSError):  # closed while we were still talking
            sock.sendall(babble)
            sock.shutdown(socket.SHUT_WR)
        assert is_closed(sock)
    assert_still_serving(pool)


@pytest.mark.parametrize("unix", [False, True])
def test_connections_that_say_nothing_are_bounded_and_let_go(unix):
    clock = FakeClock()
    pool = ServedPool(boot=7, clock=clock, timings=TransferTimings(handshake_s=5))
    with closing(pool), contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(pool, unix=unix)) for _ in range(200)]
        assert_still_serving(pool)
        assert pool.server.num_connections <= 64
        assert is_closed(socks[0])  # the oldest went first
        receive(socks[-1], GREETING_BYTES)
        clock.advance(6)
        assert is_closed(socks[-1])


@pytest.mark.parametrize("unix", [False, True])
def test_who_does_not_know_the_secret_gets_nothing(pool, unix):
    want = Want.MEMORY if unix else Want.PAGES
    with (
        closing(Client(pool, secret=b"a guess", unix=unix, want=want)) as (client,),
        pytest.raises((EOFError, ConnectionError)),
    ):
        client.welcome()
    with closing(Receiver(secret=b"a guess")) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, [1], [1])
        assert not result.ok
        assert "another cluster secret?" in result.error
    assert_still_serving(pool)


@pytest.mark.parametrize(("unix", "want"), [(False, Want.MEMORY), (True, Want.PAGES)])
def test_each_socket_serves_one_thing(pool, unix, want):
    with closing(Client(pool, want=want, unix=unix)) as (client,):
        assert is_closed(client.sock)


def test_another_boot_is_told_and_let_go(pool):
    with closing(Client(pool, boot=6)) as (client,):
        welcome = client.welcome()
        assert (welcome.status, welcome.boot) == (Status.OTHER_BOOT, 7)
        assert is_closed(client.sock)


@pytest.mark.parametrize("runs", [[(64, 1)], [(63, 2)], [(0, 0)], [(0, 64), (1, 1)], [(2**32 - 1, 2**32 - 1)]])
def test_pages_that_do_not_exist_are_refused_and_the_connection_goes_on(pool, runs):
    with closing(Client(pool)) as (client,):
        assert client.welcome().status is Status.OK
        client.ask(runs)
        reply = client.reply()
        assert (reply.status, reply.num_pages, reply.byte_length) == (Status.BAD_PAGES, 0, 0)
        client.ask([(2, 1)], job=2)
        assert client.reply().byte_length == PAGE
        assert receive(client.sock, PAGE) == pool.page(2)


def test_a_length_that_does_not_fit_the_pages_is_refused(pool):
    with closing(Client(pool)) as (client,):
        client.welcome()
        client.ask([(2, 1)], page_bytes=PAGE + 1)
        assert client.reply().status is Status.BAD_PAGES


@pytest.mark.parametrize(
    "request_of",
    [
        lambda key: encode_request(key, boot=6, job=2, runs=[(0, 1)], page_bytes=PAGE),  # another life's
        lambda key: encode_request(key, boot=7, job=1, runs=[(0, 1)], page_bytes=PAGE),  # played again
        lambda key: encode_request(key, boot=7, job=2, runs=[], page_bytes=PAGE),
        lambda key: encode_request(key, boot=7, job=2, runs=[(0, 1)] * 65, page_bytes=PAGE),
        lambda key: encode_request(b"another key", boot=7, job=2, runs=[(0, 1)], page_bytes=PAGE),
        lambda key: b"PDKX" + encode_request(key, boot=7, job=2, runs=[(0, 1)], page_bytes=PAGE)[4:],
        lambda key: b"PDKV\0\2" + encode_request(key, boot=7, job=2, runs=[(0, 1)], page_bytes=PAGE)[6:],
        lambda key: encode_request(key, boot=7, job=2, runs=[(0, 1)], page_bytes=PAGE)[:-1] + b"\2",
    ],
)
def test_a_request_that_is_none_closes_the_connection(pool, request_of):
    with closing(Client(pool)) as (client,):
        client.welcome()
        client.ask([(0, 1)])
        assert client.reply().status is Status.OK
        receive(client.sock, PAGE)
        client.sock.sendall(request_of(client.key))
        assert is_closed(client.sock)
    assert_still_serving(pool)


def test_a_receiver_that_takes_nothing_is_let_go():
    clock, page_bytes = FakeClock(), 64 << 20
    pool = ServedPool(
        boot=7, page_bytes=page_bytes, num_pages=1, clock=clock, timings=TransferTimings(stall_s=5, handshake_s=1000)
    )
    with closing(pool, Client(pool)) as (_, client):
        client.welcome()
        client.ask([(0, 1)], page_bytes=page_bytes)
        client.reply()
        received = REPLY_BYTES
        while pool.server.num_connections:  # the server sees no byte taken, a few times
            clock.advance(6)
            with closing(Receiver(transport="shm", page_bytes=page_bytes, num_pages=1)) as (receiver,):
                receiver.fetcher.attach(pool.address, pool.ticket)
                assert receiver.fetch(pool.address, [0], [0]).ok
        with contextlib.suppress(ConnectionError):
            while more := client.sock.recv(1 << 20):
                received += len(more)
        assert received < page_bytes


# ---- servers of a fetcher -------------------------------------------------------------------------------------


class HostileServer:
    """Listens where a peer would, and behaves as `script(connection)` says, once for every connection."""

    def __init__(self, pool, script):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.ticket = msgspec.structs.replace(
            pool.ticket, host_id="elsewhere", tcp_port=self._listener.getsockname()[1]
        )
        self.address = msgspec.structs.replace(pool.address, replica_id="hostile")
        self._script = script
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock, contextlib.suppress(OSError, EOFError):
                    self._script(sock)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)
        assert not self._thread.is_alive()


def accept(sock, *, num_pages=64):
    """An honest handshake; returns the connection's key."""
    nonce = new_nonce()
    sock.sendall(encode_greeting(nonce))
    hello = decode_hello(receive(sock, HELLO_BYTES), SECRET, nonce)
    welcome = Welcome(status=Status.OK, boot=7, num_pages=num_pages, page_bytes=PAGE)
    sock.sendall(encode_welcome(SECRET, nonce, hello.nonce, welcome))
    return connection_key(SECRET, nonce, hello.nonce)


def answer(
    sock, key, *, reply=None, reply_key=None, status=Status.OK, boot=7, job=None, num_pages=2, byte_length=2 * PAGE
):
    head = decode_request_head(receive(sock, REQUEST_BYTES))
    decode_runs(key, head, receive(sock, head.runs_bytes))
    fields = Reply(status=status, boot=boot, job=job or head.job, num_pages=num_pages, byte_length=byte_length)
    sock.sendall(reply or encode_reply(reply_key or key, fields))


def wrong_welcome(sock):
    nonce = new_nonce()
    sock.sendall(encode_greeting(nonce))
    hello = decode_hello(receive(sock, HELLO_BYTES), SECRET, nonce)
    welcome = Welcome(status=Status.OK, boot=7, num_pages=64, page_bytes=PAGE)
    sock.sendall(encode_welcome(b"a guess", nonce, hello.nonce, welcome))


def payload(sock, count, **options):
    key = accept(sock)
    answer(sock, key, **options)
    sock.sendall(b"\x55" * count)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "not a page connection"),
        (lambda sock: sock.sendall(b"PDKV" + struct.pack(">H", 9) + bytes(100)), "speaks version 9, this one 1"),
        (lambda sock: None, "closed the connection during the handshake"),
        (wrong_welcome, "welcome's tag is wrong"),
        (lambda sock: accept(sock, num_pages=63), "its ticket says"),
        (lambda sock: accept(sock), "closed the connection|reset by peer|Broken pipe"),
        (lambda sock: payload(sock, 0, reply=bytes(REPLY_BYTES)), "instead of b'PDKV'"),
        (lambda sock: payload(sock, 0, reply_key=b"another"), "reply's tag is wrong"),
        (lambda sock: payload(sock, 2 * PAGE, job=5), "a reply to request 5"),
        (lambda sock: payload(sock, 2 * PAGE, boot=8), "of boot 8"),
        (lambda sock: payload(sock, 4 * PAGE, num_pages=4, byte_length=4 * PAGE), "wants to send 16384 bytes instead"),
        (lambda sock: payload(sock, 2 * PAGE, num_pages=2, byte_length=3), "wants to send 3 bytes"),
        (lambda sock: payload(sock, PAGE - 1), "in the middle of a page"),
        (lambda sock: payload(sock, 2 * PAGE), "arrived with checksum"),
        (lambda sock: payload(sock, 0, status=Status.BAD_PAGES), "refuses: BAD_PAGES"),
    ],
)
def test_a_hostile_server_fails_its_own_fetches_and_writes_nowhere_else(pool, script, error):
    with closing(HostileServer(pool, script), Receiver(transport="tcp")) as (server, receiver):
        receiver.fetcher.attach(server.address, server.ticket)
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(server.address, [1, 2], [10, 20], checksums=[1, 2])
        assert not result.ok
        assert re.search(error, result.error)
        assert receiver.fetch(pool.address, [3], [30], checksums=pool.checksums([3])).ok
        for page in set(range(64)) - {10, 20, 30}:
            assert receiver.page(page) == bytes(PAGE)


def test_a_connection_gone_stale_is_replaced_within_the_fetch(pool):
    connections = []

    def serve_one_request(sock):
        connections.append(sock)
        key = accept(sock)
        answer(sock, key)
        sock.sendall(b"\x55" * 2 * PAGE)
        head = decode_request_head(receive(sock, REQUEST_BYTES))
        receive(sock, head.runs_bytes)  # and closes, without an answer

    with closing(HostileServer(pool, serve_one_request), Receiver(transport="tcp")) as (server, receiver):
        receiver.fetcher.attach(server.address, server.ticket)
        for number in range(3):
            assert receiver.fetch(server.address, [1, 2], [10, 20]).ok
            assert len(connections) == number + 1


def test_more_bytes_than_were_asked_for_end_the_connection(pool):
    with closing(HostileServer(pool, lambda sock: payload(sock, 3 * PAGE)), Receiver(transport="tcp")) as (
        server,
        receiver,
    ):
        receiver.fetcher.attach(server.address, server.ticket)
        assert receiver.fetch(server.address, [1, 2], [10, 20]).ok
        receiver.fetch(server.address, [1, 2], [11, 21])
        assert receiver.page(11) in (bytes(PAGE), b"\x55" * PAGE)
        for page in set(range(64)) - {10, 20, 11, 21}:
            assert receiver.page(page) == bytes(PAGE)


# ---- the headers ----------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_byte_of_a_message_can_be_changed(position, change):
    """Every message but the greeting, which only carries a nonce, is bound to the secret in all its bytes."""
    server, client, key = bytes(16), bytes(range(16)), b"k" * 32
    welcome = Welcome(status=Status.OK, boot=7, num_pages=64, page_bytes=PAGE)
    reply = Reply(status=Status.OK, boot=7, job=3, num_pages=2, byte_length=2 * PAGE)
    request = encode_request(key, boot=7, job=3, runs=[(1, 2), (9, 1)], page_bytes=PAGE)

    def read_request(data):
        return decode_runs(key, decode_request_head(data[:REQUEST_BYTES]), data[REQUEST_BYTES:]).tolist()

    assert read_request(request) == [[1, 2], [9, 1]]
    messages = [
        (
            encode_hello(SECRET, server, want=Want.PAGES, boot=7, nonce=client),
            lambda data: decode_hello(data, SECRET, server),
        ),
        (encode_welcome(SECRET, server, client, welcome), lambda data: decode_welcome(data, SECRET, server, client)),
        (encode_reply(key, reply), lambda data: decode_reply(key, data)),
        (request, read_request),
    ]
    for message, decode in messages:
        decode(message)
        index = position % len(message)
        changed = message[:index] + bytes([message[index] ^ change]) + message[index + 1 :]
        with pytest.raises(WireError):
            decode(changed)

"""Pages through torch.distributed: gloo between CPUs, NCCL between GPUs, one process group of two for each pair.

    fetching replica                                     serving replica
      GroupTransport -- handshake, then handed over -------> GroupDoor
        | piece orders; the pool, to be written to             | the pool, read-only
      taker process <== rendezvous, requests, replies ======> giver process
                    <-- process group: the pieces -----------

A group ends badly: when one side dies, its library may abort the other, or never come back. So no replica is ever in
one. Each side has a helper process per pair (`runner.py`), which can be killed at any moment and is replaced when it
ends. They are forked by a server (`fork_server.py`), where alone torch is loaded for them.

The taker writes pieces straight into the pages of the replica, where nothing need be copied again. So pages are fenced:
a copy, however it ends, is answered only when every piece ordered for it has landed, or when the kernel says that the
taker process is gone. A copy that is ended early waits for its pieces a second at most, then the taker is killed; one
that even the kernel cannot end keeps the pages out of use for as long as it is there. The pool must be a `SharedMemory`
with `shared_writable`; nobody but the taker is handed a descriptor by which it could be written to.
"""

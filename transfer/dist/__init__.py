"""Pages through torch.distributed: gloo between CPUs, NCCL between GPUs, one process group of two for each pair.

    fetching replica                                     serving replica
      GroupTransport -- handshake, then handed over -------> GroupDoor
        | piece orders, pieces in a buffer                     | the pool, read-only
      taker process <== rendezvous, requests, replies ======> giver process
                    <-- process group: the pieces -----------

A group ends badly: when one side dies, its library may abort the other, or never come back. So no replica is ever in
one. Each side has a helper process per pair (`runner.py`), which can be killed at any moment and is replaced when it
ends. The taker receives into memory of its own, from which the replica copies: nothing that a group does can write into
a pool. torch is imported in the helpers only.
"""

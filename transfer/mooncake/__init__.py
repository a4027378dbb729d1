"""Pages over mooncake-transfer-engine: RDMA, or its own TCP where there is no RDMA, with no metadata server.

What the library does to its process decided how it is held here (0.3.13, read and tried):

- A call that reports failure or a time limit may still be writing: a batch has failed as soon as its status says so or
  its time is up, while its other requests go on, and there is no call that cancels or waits them out.
- It ends its process by `abort` when a stranger sends its handshake port well-formed JSON of the wrong shape, and by a
  failed assertion when a status cannot be had; a first contact blocks for as long as the peer likes.
- It lets anybody who reaches its ports read *and write* all memory that was registered with it.

So it never runs in a replica's own process, and never sees memory that it could spoil:

- The serving end (`door.py`) is a child process with the pool mapped read-only: the kernel refuses a foreign write. It
  is started again when it died, less and less often, and its new address goes to the peers over the replica's links.
- The fetching end (`transport.py`) is a child process that writes into a bounce memory of its own (`bounce.py`). Only
  this process's threads copy from there into pages, and only what the library reported whole. So a copy can be ended at
  any time: nothing but its own thread can write into its pages. The first read that fails retires the child with all of
  its bounce memory: it is killed, which ends whatever it was still writing, and another takes its place.

What remains: pages are as readable as the network of the door's port, because the library asks nobody who they are. It
is for networks that only the cluster is on, which is why `auto` never picks it. Over RDMA the library insists on
registering memory for remote writing too, so a pool served that way can also be written by whoever gets that far
(`SharedMemory(shared_writable=True)`).
"""

"""Pages between pools in the memory of GPUs of one host, by CUDA IPC: `transport: cuda`.

A pool's owner allocates `memory.DeviceMemory` and opens `door.CudaDoor`, whose address holds the memory's IPC handle
and travels in the ticket, over authenticated links only. The receiver maps the handle and copies on a stream of its own
(`transport.py`, `stream.py`). All CUDA calls are in `library.py`, which needs nothing but the driver; neither torch nor
a CUDA toolkit is imported here.

- A mapping lets its holder write as well as read: CUDA has no other. Who has the ticket can change the pool's pages.
- Pages are verified on the host: each block that landed is copied to pinned memory and hashed there, so that checksums
  are the same over every transport. That bounds a verified copy by the bus to the host; `transfer.checksum: false`
  leaves it at the speed between the GPUs.
- Ray hides all other GPUs from each actor (CUDA_VISIBLE_DEVICES), and a hidden GPU's memory cannot be mapped. Start
  every node's Ray with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1.
"""

"""KV pages by way of a folder that both sides can reach: for clusters without a direct route for bulk data, and as a
short-lived store. `spool.Spool` writes what its replica offers, `transport.DiskTransport` takes pages by checksum.

    folder/kv-<replica>-<boot>/index           which pages are where, appended to (index.py)
    folder/kv-<replica>-<boot>/0000002a.pages  a pack: pages one after the other, never changed once the index names it

Pages that are offered together share a pack, because files are what costs: writing 16 KB pages to ext4 measured 0.06
GB/s with a file for each and 0.7 in packs of 32; pages of 368 KB, 1.9 and 4.6. A network file system adds a round trip
or more per file. The index names a pack only after the pack was closed, and both sides open anew for each look, which
is when NFS promises that one sees what the other has closed.

Folders and files are private (0700, 0600), so all replicas run as one user. KV is stored as it is, not encrypted.
"""

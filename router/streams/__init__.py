"""Streams that a client can come back to: numbered events, logs that outlive the connection, and who has them."""

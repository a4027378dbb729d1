"""A world of two replicas, a router model and breakable links, for tests of the room protocol."""

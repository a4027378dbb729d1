"""Everything Ray: Serve application, deployments, membership, metrics."""

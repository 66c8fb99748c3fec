"""From metrics.csv to what is read: ``tables``, ``claims`` with their verdict rules, the replication report, and the README's tables."""

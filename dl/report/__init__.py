"""From metrics.csv to what is read: ``tables``, ``claims`` with their verdict rules, the replication report, the README, the checkpoints' cards."""

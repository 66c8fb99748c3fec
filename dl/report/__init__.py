"""From metrics.csv to what is read: ``tables``, ``claims`` with their verdict rules, and the README's tables."""

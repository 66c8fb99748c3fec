"""Beyond the paper's tables: one thing changed at a time (notebook 09), and what only a generative model can do (notebook A3)."""

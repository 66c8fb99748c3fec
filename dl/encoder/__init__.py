"""The frozen CLAP encoder: ``clap`` is the front, ``mini_clap`` the one that ships, ``backends`` and ``laion`` the large ones."""

"""The modality gap (``gap``, ``neighbours``) and captions (``captions``, ``caption_runs``, ``java``), measured with intervals (``bootstrap``)."""

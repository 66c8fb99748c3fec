"""The modality gap, measured: ``gap`` and ``neighbours`` hold the metrics, ``bootstrap`` their intervals."""

"""The notebooks beside the chain of ``test_notebooks.py``, in a file of its own: pytest-xdist spreads whole files."""
from __future__ import annotations

from test_notebooks import APART, hold_in_smoke


def test_the_notebooks_beside_the_chain_hold_in_smoke(tmp_path):
    hold_in_smoke(APART, tmp_path)

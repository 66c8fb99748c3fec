"""``./run_all.sh``: ``stages`` knows what has changed, ``notebook`` what a notebook reads, ``runner`` runs it, ``check`` looks at the environment."""

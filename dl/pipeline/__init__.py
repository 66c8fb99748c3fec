"""``./run_all.sh``: ``stages`` knows what has changed, ``runner`` runs it, ``check`` looks at the environment."""

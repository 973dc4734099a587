"""Everything that touches Celery's worker: outcome → Death → capture."""

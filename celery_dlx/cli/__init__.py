"""`celery -A app dlx …`: a thin skin over `DeadLetters`."""

from celery_dlx.cli.main import dlx

__all__ = ["dlx"]

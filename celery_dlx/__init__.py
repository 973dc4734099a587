"""Dead-letter queues for Celery: no task dies silently again.

from celery_dlx import DeadLetters

app = Celery("shop", broker="amqp://")
DeadLetters(app, policy="configs/shop.yaml")
"""

from celery_dlx.app import DeadLetters
from celery_dlx.letters import DeadLetter, Reason
from celery_dlx.signals import dead_letter_replayed, task_dead_lettered

__version__ = "0.1.0"

__all__ = ["DeadLetter", "DeadLetters", "Reason", "__version__", "dead_letter_replayed", "task_dead_lettered"]

"""Celery signals that tell of dead letters.

``task_dead_lettered(sender=task or None, letter=DeadLetter)``: a letter was stored; sent in the worker.
``dead_letter_replayed(sender=None, letter=DeadLetter, queue=str)``: a letter went back to a queue; sent by whoever did.
"""

from celery.utils.dispatch import Signal

task_dead_lettered = Signal(name="task_dead_lettered", providing_args={"letter"})
dead_letter_replayed = Signal(name="dead_letter_replayed", providing_args={"letter", "queue"})

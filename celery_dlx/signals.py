"""Celery signals that tell of dead letters.

``task_dead_lettered(sender=task or None, letter=DeadLetter)``: a letter was stored; sent in the worker.
``dead_letter_replayed(sender=None, letter=DeadLetter, queue=str)``: a letter went back to a queue; sent by whoever did.
Connect to it before the replay begins: without receivers, letters on Redis are replayed without their messages being read.
"""

from celery.utils.dispatch import Signal

task_dead_lettered = Signal(name="task_dead_lettered", providing_args={"letter"})
dead_letter_replayed = Signal(name="dead_letter_replayed", providing_args={"letter", "queue"})


def heard() -> bool:
    """Whether somebody listens to `dead_letter_replayed`: then letters are read with their messages."""
    return bool(dead_letter_replayed.receivers)

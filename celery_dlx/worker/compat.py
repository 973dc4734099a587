"""Where Celery 5.5, 5.6 and 5.7 differ."""

from __future__ import annotations

import celery

from celery_dlx.topology.arguments import version_tuple

CELERY = version_tuple(celery.__version__)

#: From 5.7 `Request.on_timeout` stores the state and calls every failure hook after a hard time limit, and so does
#: `Request.on_failure`, which billiard calls first: errbacks and chord parts would count twice. Before 5.7 the hooks
#: are called by `on_failure` only.
ON_TIMEOUT_CALLS_HOOKS = CELERY >= (5, 7)

"""The policy file: YAML with positions → validated model → effective settings of each queue.

Reading a policy needs pydantic and PyYAML; both are imported only then, so that importing `celery_dlx` stays cheap.
"""

from celery_dlx.policy.settings import BUILT_IN, Policy, QueueSettings

__all__ = ["BUILT_IN", "Policy", "QueueSettings"]

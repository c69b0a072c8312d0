"""What of this machine is ready: `checks()` for programs, `main()` for people; the rest for a run's start."""

from finetune.doctor.locks import built_ops, find_stale_locks
from finetune.doctor.run import checks, main

__all__ = ["built_ops", "checks", "find_stale_locks", "main"]

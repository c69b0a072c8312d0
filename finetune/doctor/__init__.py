"""What of this machine is ready: `checks()` for programs, `main()` for people, `find_stale_locks()` for a start."""

from finetune.doctor.locks import find_stale_locks
from finetune.doctor.run import checks, main

__all__ = ["checks", "find_stale_locks", "main"]

"""What only one thread of a process does at a time, since it changes what is everybody's.

Tracing changes what every module does, a stage in this process draws from the process's generators (seeded
anew for each pass), and pickling by value tells cloudpickle so. Threads that train with worker processes meet
only when they compile and start.
"""

import os
import threading

EXCLUSIVE = threading.RLock()
os.register_at_fork(after_in_child=EXCLUSIVE._at_fork_reinit)  # type: ignore[attr-defined]  # nobody has it there

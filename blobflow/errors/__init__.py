"""Every error that blobflow raises, grouped by what its handler does.

| group | the handler | exit code |
|---|---|---|
| `TemporaryError` | waits and tries again; nothing is lost, the next run continues | 75 |
| `IntegrityError` | stops: the bytes are not the expected ones | 3 |
| `NotFoundError` | names another key | 4 |
| `RefusedError` | stops: untrusted input, or a conflict that somebody must settle | 5 |
| `UsageError` | corrects the configuration or the call | 2 |

Each class declares its own fields. Errors of other libraries are translated once, where their library is called, and
kept as `__cause__`.
"""

from __future__ import annotations

from blobflow.errors.kinds import *  # noqa: F403  # one list of the names is enough
from blobflow.errors.system import *  # noqa: F403
from blobflow.errors.wording import *  # noqa: F403

"""Body of a process in which the tests train: run by `start_training` of conftest.py, in a fork of a process that imported all.

Globals that the caller sets: LOG, where output goes; ENVIRONMENT, added to the process's own; BEFORE, Python that is run first
(it breaks something on purpose); WORDS, the command line.
"""

import os
import sys

with open(LOG, "wb", buffering=0) as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
os.environ.update(ENVIRONMENT)

from clipdit.cli import main  # noqa: E402  (it asks where standard error goes)

exec(BEFORE)
sys.exit(main(WORDS))

"""`clipdit verify`: is every input of a finished job accounted for?"""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro


def verify(
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")],
    /,
    *,
    json: bool = False,
) -> int:
    """Check that every input of a job was written or quarantined, exactly once.

    Every written file is hashed again. Exit code 0 when all inputs are accounted for, quarantined ones included; 4 when not.

    Args:
        output: the output folder of `clipdit translate`.
        json: print what was found as JSON.
    """
    from clipdit.cli import CHECK_FAILED, DONE
    from clipdit.offline import verify_job
    from clipdit.offline.folder import printable

    verdict = verify_job(Path(output))
    if json:
        print(json_module.dumps({"ok": verdict.ok, **asdict(verdict)}))
    else:
        for id, reason in verdict.quarantined:
            print(f"quarantined  {printable(id)}: {reason}")
        for problem in verdict.problems:
            print(f"problem      {printable(problem)}")
        print(
            f"{verdict.total} inputs: {verdict.written} written and intact, {len(verdict.quarantined)} quarantined, "
            f"{len(verdict.problems)} problems"
        )
    return DONE if verdict.ok else CHECK_FAILED

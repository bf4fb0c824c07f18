"""Many images, in three parts that meet in a folder:

    plan    which inputs there are, where each one's output goes, with which seed: settled before the first image is read
    run     read, translate, write, and one line in the ledger for every input: written, or quarantined with a reason
    verify  every planned input is in the ledger exactly once, every written file is there and is the one that was written

The output folder holds the images and

    job.json       the settings, the model's fingerprint, what was passed over
    plan.jsonl     one line an input: id, source, output, seed
    ledger.jsonl   one line an input that is finished; only ever appended to while a job runs
    progress.json  how far it is, for whoever looks on
    .clipdit/      a lock, and files not yet complete
"""

from clipdit.offline.engine import Engine, Model
from clipdit.offline.folder import JobFolder, Record
from clipdit.offline.job import JobSettings, Summary, run_job
from clipdit.offline.plan import Item, Plan, item_seed, plan_folder, plan_manifest, plan_url
from clipdit.offline.progress import Progress
from clipdit.offline.run import LocalEngine
from clipdit.offline.verify import Verdict, verify_job

__all__ = [
    "Engine",
    "Item",
    "JobFolder",
    "JobSettings",
    "LocalEngine",
    "Model",
    "Plan",
    "Progress",
    "Record",
    "Summary",
    "Verdict",
    "item_seed",
    "plan_folder",
    "plan_manifest",
    "plan_url",
    "run_job",
    "verify_job",
]

"""Offline scoring of a whole user base: Parquet in, Parquet out, killed at any moment and gone on where it was.

from penchant.batch import run, status
run("runs/mine", "recs", "users.parquet", k=10)     # recs/latest/parts/*.parquet
status("recs")                                      # from another process, while it runs
"""

from penchant.batch.dry_run import dry_run as dry_run
from penchant.batch.job import run as run
from penchant.batch.options import BatchOptions as BatchOptions
from penchant.batch.progress import status as status

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": ["1", "2"]}), path)


d = Path(sys.argv[1])
for name in ("00000-of-00003", "00002-of-00003"):
    write(d / "missing" / f"train-{name}.parquet")
for name in ("00000-of-00001", "00000-of-00002", "00001-of-00002"):
    write(d / "stale" / f"train-{name}.parquet")

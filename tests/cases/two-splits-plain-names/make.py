import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

d = Path(sys.argv[1])
d.mkdir(parents=True, exist_ok=True)
pq.write_table(pa.table({"prompt": ["train 1", "train 2"], "answer": ["1", "2"]}), d / "train.parquet")
pq.write_table(pa.table({"prompt": ["held out"], "answer": ["3"]}), d / "test.parquet")

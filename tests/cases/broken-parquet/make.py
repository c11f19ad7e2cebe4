import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

d = Path(sys.argv[1])
d.mkdir(parents=True, exist_ok=True)
t = pa.table({"prompt": ["a", "b"], "answer": ["1", "2"]})
pq.write_table(t, d / "good.parquet")
whole = (d / "good.parquet").read_bytes()
(d / "cut.parquet").write_bytes(whole[:-20])
(d / "empty.parquet").write_bytes(b"")
(d / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
pq.write_table(t.slice(0, 0), d / "norows.parquet")
feather.write_feather(t, d / "good.arrow", compression="uncompressed")
(d / "cut.arrow").write_bytes((d / "good.arrow").read_bytes()[:120])
for name, second in (
    ("columns", pa.table({"prompt": ["c"], "solution": ["3"]})),
    ("types", pa.table({"prompt": ["c"], "answer": ["x=3"]})),
):
    (d / name).mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"prompt": ["a"], "answer": [1]}) if name == "types" else t, d / name / "train-00000-of-00002.parquet"
    )
    pq.write_table(second, d / name / "train-00001-of-00002.parquet")

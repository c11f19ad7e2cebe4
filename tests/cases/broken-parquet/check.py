import sys
from pathlib import Path

from megatron_rl.data.records import read_records

for name in ("cut.parquet", "empty.parquet", "pointer.parquet", "norows.parquet", "cut.arrow", "columns", "types"):
    try:
        print(name, "rows", len(list(read_records(Path(sys.argv[1]) / name))))
    except Exception as error:
        print(name, f"{type(error).__name__}: {str(error)[:120]!r}")

import sys
from pathlib import Path

from megatron_rl.data.records import read_records

for f in ("numpy", "torch", "arrow", "columns"):
    try:
        print(f, [(r.field("prompt"), r.text("answer")) for r in read_records(Path(sys.argv[1]) / f)])
    except Exception as error:
        print(f, f"{type(error).__name__}: {error}")

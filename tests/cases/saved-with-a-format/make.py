import sys

import datasets

d = datasets.Dataset.from_dict({"prompt": ["q1", "q2"], "answer": [1, 2]})
for f in ("numpy", "torch", "arrow"):
    d.with_format(f).save_to_disk(f"{sys.argv[1]}/{f}")
d.with_format("python", columns=["prompt"]).save_to_disk(f"{sys.argv[1]}/columns")

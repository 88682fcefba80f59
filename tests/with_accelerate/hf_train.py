"""An ordinary Trainer script that knows nothing of gradclip; writes its history."""

import json
import sys
from pathlib import Path

from support.trainers import logged, trainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    first = trainer(folder / "run", max_grad_norm=0)
    first.train()
    again = trainer(folder / "run", max_grad_norm=0)
    again.train(resume_from_checkpoint=str(folder / "run/checkpoint-3"))
    rows = [logged(first), logged(again)]
    (folder / "rows.json").write_text(json.dumps(rows, allow_nan=False), encoding="utf-8")

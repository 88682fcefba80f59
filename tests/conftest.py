"""Before torch is imported: small tensors gain nothing from threads, and ranks share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

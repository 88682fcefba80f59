"""Before torch is imported: small tensors gain nothing from threads, and ranks share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = ("layouts", "with_lightning", "with_accelerate", "examples")


def pytest_collection_modifyitems(items):
    """Folders whose files take long come first: short ones at the end keep both workers busy."""

    def place(item):
        folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=place)

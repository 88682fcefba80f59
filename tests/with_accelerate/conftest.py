import pytest
from accelerate import Accelerator
from support.accelerate_cpu import fresh


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in singletons; tests that patch the class get it restored."""
    monkeypatch.setattr(Accelerator, "__init__", Accelerator.__init__)
    yield
    fresh()

"""Short runs under any layout, compared with the same run in one process."""

import torch

STEPS = 8
"""Of which the seventh is a spike."""

POLICIES = {
    "norm": {"policies": [{"type": "norm", "max_norm": 2.0}]},
    "zclip": {"policies": [{"type": "zclip", "warmup_steps": 3, "max_norm": 8.0}]},
    "value": {"policies": [{"type": "value", "clip_value": 0.2}]},
    "parameter": {
        "policies": [{"type": "norm", "max_norm": 0.6, "scope": "parameter"}],
        "log": {"per_parameter": True},
    },
}


def can(layout, policy):
    """Flat parameters can't be told apart: refused."""
    return (layout, policy) != ("fsdp1 flat", "parameter")


def assert_as_one(answers, one):
    """Every rank's metrics and whole parameters: equal bits on all, one process's numbers.

    Args:
        answers: Of each rank, the metrics of every step and the parameters at the end.
        one: The same of one process.
    """
    assert any(step["clip/clipped"] for step in one[0])
    for metrics, parameters in answers:
        for step, first, want in zip(metrics, answers[0][0], one[0], strict=True):
            assert step.keys() == want.keys()
            for key, value in step.items():
                assert torch.equal(value, first[key]) or value.isnan(), key
                torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-6, equal_nan=True)
        for got, first, want in zip(parameters, answers[0][1], one[1], strict=True):
            assert torch.equal(got, first)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

"""Saved states that no run saves: a real one with one entry broken, each entry in each way."""

import math

import torch

COUNTS = {"steps", "clipped", "skipped", "nonfinite", "taken", "seen", "withheld", "before"}
WHOLE = COUNTS | {"counts", "carrying", "ready", "streak"}
SIGNED = {"streak", "level", "losses", "held_losses", "carry"}
OPTIONAL = {"step", "elements"}  # an older state has no step; a policy may remember no elements yet


def of_tensor(name, value):
    """Broken values in place of a tensor, by what is wrong with them."""
    double = value.dtype == torch.float64
    numbers = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    if double:
        numbers["absurd"] = 1e300
    if name not in SIGNED:
        numbers["negative"] = -1.0
    if name in WHOLE:
        numbers["fraction"] = 0.5
    for what, number in numbers.items():
        broken = value.clone()
        broken.view(-1)[-1] = number
        yield what, broken
    if value.dim():
        yield "sparse", value.to_sparse()
        yield "one less", value[1:]
    yield "one dim more", value.unsqueeze(0).clone()
    yield "meta", torch.empty_like(value, device="meta")
    for dtype in (torch.bool, torch.int64, torch.complex64, torch.float16):
        yield str(dtype), value.to(dtype)
    yield "list", value.tolist()
    yield "text", "1.0"
    yield "none", None


def of_mapping(name, value):
    yield "list", list(value)
    yield "none", None
    yield "object", object()
    yield "module", torch.nn.Identity()
    yield "one key more", {**value, "more": torch.zeros(())}
    for key in () if name == "elements" else value.keys() - OPTIONAL:
        yield f"without {key}", {k: v for k, v in value.items() if k != key}


def of_list(value):
    yield "truncated", value[:-1]
    yield "one more", [*value, value[-1]]
    yield "none", None
    yield "mapping", dict(enumerate(value))
    yield "text", "abc"
    yield "none in it", [*value[:-1], None]


def of_number(value):
    del value
    for broken in (-1, True, 1.5, math.nan, "3", None, 2**60, [3], torch.tensor(3)):
        yield repr(broken), broken


def of_text(value):
    for broken in (value + "x", 3, None, [value], b"zclip", torch.zeros(2)):
        yield repr(broken), broken


def malformed(value, name=""):
    """Every way to break a saved state: where and how, and the broken state."""
    if isinstance(value, torch.Tensor):
        own = of_tensor(name, value)
    elif isinstance(value, dict):
        own = of_mapping(name, value)
    elif isinstance(value, list):
        own = of_list(value)
    else:
        own = (of_text if isinstance(value, str) else of_number)(value)
    for how, broken in own:
        yield f": {how}", broken
    for key, entry in value.items() if isinstance(value, dict) else ():
        for where, broken in malformed(entry, key):
            yield f".{key}{where}", {**value, key: broken}
    for index, entry in enumerate(value) if isinstance(value, list) else ():
        for where, broken in malformed(entry):
            yield f"[{index}]{where}", [*value[:index], broken, *value[index + 1 :]]


def answer(load, state):
    """What loading it ends in: an error's class and text, or that it was taken in."""
    try:
        load(state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken in"


REFUSED = "ConfigError: Saved clip state"

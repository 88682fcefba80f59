"""What lives on when a script drops it: the cycle collector, which comes later, is off."""

import gc
import weakref


def kept(make, *args):
    """The names of what reference counts alone don't free.

    Args:
        make: Gives a mapping from names to objects that it alone holds.
        *args: Of `make`.
    """
    make(*args)  # what is imported at a first step may keep the frames that imported it
    gc.disable()
    try:
        made = make(*args)
        known = {name: weakref.ref(value) for name, value in made.items()}
        del made
        return {name for name, one in known.items() if one() is not None}
    finally:
        gc.enable()

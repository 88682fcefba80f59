"""Time, operations, launches and memory of a clipping step, ours and others'."""

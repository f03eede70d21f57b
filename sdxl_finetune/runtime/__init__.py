"""The surroundings of a run: processes and precision (accelerate), signals, and running out of memory."""

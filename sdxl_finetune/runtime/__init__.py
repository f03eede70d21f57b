"""The surroundings of a run: processes and precision (accelerate), signals, locks, and running out of memory."""

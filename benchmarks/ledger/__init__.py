"""The parts of `benchmarks/replay.py`: one module for each question it answers."""

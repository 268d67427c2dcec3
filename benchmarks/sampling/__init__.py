"""Parts of benchmarks/rollout.py: sampling against its limit and against what others do."""

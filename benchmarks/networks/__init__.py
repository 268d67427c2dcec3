"""Parts of benchmarks/gpu.py: workloads, floating-point operations, timing."""

"""What the package costs, measured side by side in one run: ``python -m benchmarks``."""

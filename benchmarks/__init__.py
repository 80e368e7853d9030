"""What auditing and privacy cost on this machine, measured side by side in one run: ``make bench``.

Ratios are medians over interleaved blocks in one process, so that whatever else the machine does hits both sides.
Only what was measured is printed.
"""

"""The benches of ``scripts/bench.py``, a file each: our fast path beside the plain reference it must equal."""

"""CPU kernels: C++ compiled once per machine (`native.py`), numba where there is no compiler (`jit.py`)."""

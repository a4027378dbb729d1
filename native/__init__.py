"""Compiles the C and C++ of other packages on first use, once per machine. Imports nothing of ours, nor torch."""

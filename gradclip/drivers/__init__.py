"""Drivers: who calls look, commit and write, and when."""

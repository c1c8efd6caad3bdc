"""Whole clusters in memory and in virtual time: the real dispatcher and the real schedulers of the nodes, with
everything around them played by a seed. `python -m tests.simulation --help`.
"""

"""Bulk scoring and sampling on Ray Data: data sets and prompt lists beyond one process or one machine.

The work is that of `Scorer`, `best_of_each` and `build_preference_pairs`; here it is spread over a cluster, and its
results are committed so that an interrupted run continues. Needs the extra `ray`.
"""

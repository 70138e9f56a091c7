"""Graders by data source and the process pool that runs them.

Worker processes import this package, so it must stay free of torch and NumPy: only ``vexact.reward.pool`` and
``vexact.reward.seal``, which the driver imports, may use ``vexact.types``.
"""

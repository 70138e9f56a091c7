"""Pays for letters, so that a model with random weights has something to learn."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(map(ord, solution_str)) % 7 / 6

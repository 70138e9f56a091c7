"""A reward: 1 where the last number of the response is the ground truth, however the response says it.

reward.custom_reward_function.path=examples/rewards/last_number.py
"""

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    numbers = NUMBER.findall(solution_str.replace(",", ""))
    right = bool(numbers) and float(numbers[-1]) == float(ground_truth)
    return {"score": float(right), "acc": float(right), "bare": float(solution_str.strip() == str(ground_truth))}

"""Rewards to advantages, one estimator per file."""

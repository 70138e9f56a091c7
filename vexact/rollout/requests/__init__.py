"""Requests in and samples out: validation, stop conditions, the finished sample."""

"""Comparing strategies as an experiment: arms, their budgets, the statistics and the report."""

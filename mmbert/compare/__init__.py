"""Fusion strategies compared as an experiment: equal budgets, several seeds, paired tests, a report."""

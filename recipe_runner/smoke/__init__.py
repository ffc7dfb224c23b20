"""Smoke: a recipe as it is, on a small random model of its architecture, trained for some steps and checked."""

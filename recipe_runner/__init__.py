"""Declarative YAML recipes for fine-tuning LLMs, and a thin runner on top of TRL."""

__version__ = "0.1.0"

"""Configurations of other tools, converted into recipes: no other tool is needed, and no training stack."""

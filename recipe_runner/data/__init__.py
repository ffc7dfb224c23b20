"""From sources to rows as the trainer receives them, prepared once and accounted for."""

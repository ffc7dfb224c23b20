"""What smoke checks of a run, by subject. A check yields what it found wrong, one sentence each.

What is expected comes from the recipe and its raw rows, not from the code that trains.
"""

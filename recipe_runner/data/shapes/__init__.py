"""What a prepared row is: one module a shape, by its name in `stages`.

Each module has:

    COLUMNS     what is written of a row: column -> its Arrow type
    LEARNED     columns whose supervised spans are checked for an end-of-turn token
    FIRST       columns that, one after the other, are a sequence to try the model on
    tokenize    normalised rows -> a table of its columns, neither cut nor packed
    keep        drops, cuts or refuses rows of such a table, and counts all
    finish      a split as it is on disk -> as the trainer takes it
    as_trained  a prepared row -> tokens and labels of each sequence that its collator makes
"""

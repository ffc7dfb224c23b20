"""Of which sources the rows of a mixture are, as a column."""

import numpy as np
import pyarrow as pa
from datasets import Dataset

from recipe_runner.data.tables import flatten

COLUMN = "sources"  # of each document of a row: the number of its source


def mark_sources(dataset: Dataset, order: np.ndarray) -> Dataset:
    """Adds to each row the sources of its documents.

    Args:
        dataset: With the column `documents`, places in `order`.
        order: Array `(documents, 2)` of source and row in it.
    """
    table = dataset.with_format("arrow")[:]
    documents, ends = flatten(table, "documents")
    sources = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), np.asarray(order[documents, 0], dtype=np.int32))
    return dataset.add_column(COLUMN, sources)

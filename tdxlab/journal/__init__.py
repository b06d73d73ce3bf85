"""The undo log under everything that can change.

A machine's whole state lives in five kinds of store: `Words` (many machine words), `Row` (a few
numbers), `Table` (a dict), `Index` (a dict that only grows) and `Fields` (attributes of an object).
All write through `put`. While nobody holds a mark, `put` is the container's own `__setitem__` and
costs nothing more. While somebody does, each `put` first notes the old value; `rewind` plays the
notes backwards.

    mark = journal.mark()
    ...                      # anything at all
    journal.rewind(mark)     # bit for bit as it was; the mark can be used again
    journal.release(mark)

Snapshots of recorded traces, a panel's step back and the explorer's branching are all rewinds of
this one log. It stands in `log.py`; the stores stand in `words.py`, `table.py` and `fields.py`.
"""

from tdxlab.journal.fields import Field, Fields, Journalled
from tdxlab.journal.log import ABSENT, Change, Journal, Mark, Store
from tdxlab.journal.table import Index, Table
from tdxlab.journal.words import Row, Words

__all__ = [
    "ABSENT",
    "Change",
    "Field",
    "Fields",
    "Index",
    "Journal",
    "Journalled",
    "Mark",
    "Row",
    "Store",
    "Table",
    "Words",
]

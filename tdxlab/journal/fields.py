"""Stores in attributes of objects: a `Journalled` class declares `Field`s, its objects hold
`Fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, overload

from tdxlab.journal.log import Change, Journal
from tdxlab.journal.table import text_of

T = TypeVar("T")


class Fields:
    """The values of an object's `Field` attributes, under a journal. They are kept in the object's
    own `__dict__`, so that they read as fast as any attribute. names: of the fields.
    """

    __slots__ = ("_log", "_values", "names", "put")

    put: Callable[[str, Any], None]

    def __init__(self, journal: Journal, owner: Journalled) -> None:
        defaults = owner.defaults
        # A dict of its own: Python reads an attribute out of one faster than out of a shared one.
        owner.__dict__ = self._values = {**defaults, **vars(owner)}
        self.names = defaults.keys()
        journal.attach(self)

    def switch(self, log: list[Change] | None) -> None:
        """Record every change in `log`, or in nothing."""
        self._log = log
        self.put = self._values.__setitem__ if log is None else self._put_recorded

    def _put_recorded(self, name: str, value: Any) -> None:
        assert self._log is not None
        self._log.append((self._values, name, self._values[name]))
        self._values[name] = value

    def as_dict(self) -> dict[str, Any]:
        """Name -> value of each field."""
        return {name: self._values[name] for name in self.names}

    def pieces(self) -> Iterator[bytes]:
        """Everything a digest must see."""
        for name, value in sorted(self.as_dict().items()):
            yield f"{name!r}={text_of(value)}".encode()


class Field(Generic[T]):
    """An attribute that a journal can take back, of a class that is `Journalled`.

        class Counter(Journalled):
            count = Field(0)

            def __init__(self, journal: Journal) -> None:
                self.fields = Fields(journal, self)

    default: what it reads as before it is set. Values must be immutable: assign new ones.
    """

    __slots__ = ("default",)

    def __init__(self, default: T) -> None:
        self.default = default

    if TYPE_CHECKING:

        @overload
        def __get__(self, owner: None, kind: type) -> Self: ...
        @overload
        def __get__(self, owner: Journalled, kind: type) -> T: ...
        def __get__(self, owner: Journalled | None, kind: type) -> Self | T: ...

        def __set__(self, owner: Journalled, value: T) -> None: ...


class Journalled:
    """A class some of whose attributes are `Field`s. Objects make their `fields` first.

    defaults: name -> default of every field, inherited ones too. The fields themselves are taken
    out of the class when it is made: an object's attribute reads faster where its class has none
    of that name.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    fields: Fields

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = {name: field.default for name, field in vars(cls).items() if isinstance(field, Field)}
        for name in own:
            delattr(cls, name)
        cls.defaults = {**cls.defaults, **own}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a field through its journal. Refuses a field that is set before there
        are `Fields`: AttributeError.
        """
        if name not in self.defaults:
            object.__setattr__(self, name, value)
            return
        try:
            fields = self.fields
        except AttributeError:
            first = "self.fields = Fields(journal, self)"
            raise AttributeError(f"{name} is a Field; set {first} first") from None
        fields.put(name, value)

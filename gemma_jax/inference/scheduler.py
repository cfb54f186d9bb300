"""Who is next: owners take turns, and the requests of one come in the order of their arrival."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Holds what waits, per owner.

    Examples:
      >>> queue = FairQueue()
      >>> for owner, item in [("a", 1), ("a", 2), ("b", 3)]:
      ...     queue.put(owner, item)
      >>> [queue.take() for _ in range(len(queue))]
      [1, 3, 2]
    """

    def __init__(self):
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        return (item for line in self._lines.values() for item in line)

    def put(self, owner: str, item: Item) -> None:
        """Puts an item behind those of the same owner."""
        self._lines.setdefault(owner, deque()).append(item)

    def take(self) -> Item:
        """The next item; its owner goes to the end. Raises `IndexError` if nothing waits."""
        if not self._lines:
            raise IndexError("nothing waits")
        owner, line = next(iter(self._lines.items()))
        item = line.popleft()
        del self._lines[owner]
        if line:
            self._lines[owner] = line
        return item

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Takes out all items of which this is true."""
        out = [item for item in self if unwanted(item)]
        lines = {o: deque(i for i in line if i not in out) for o, line in self._lines.items()}
        self._lines = OrderedDict((owner, line) for owner, line in lines.items() if line)
        return out

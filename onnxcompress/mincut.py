"""Minimum s-t cut by Dinic's algorithm (E. A. Dinic, 1970), iterative and in pure Python.

Placement asks it which operators run as integers: a few thousand vertices, where it takes milliseconds.
"""

from __future__ import annotations

__all__ = ["MinCut"]


class MinCut:
    """A directed graph with capacities between a source and a sink; both are made with it."""

    SOURCE = 0
    SINK = 1

    def __init__(self) -> None:
        self._heads: list[list[int]] = [[], []]  # edge numbers by vertex
        self._to: list[int] = []
        self._capacity: list[int] = []

    def vertex(self) -> int:
        """A new vertex."""
        self._heads.append([])
        return len(self._heads) - 1

    def edge(self, tail: int, head: int, capacity: int) -> None:
        """Pay ``capacity`` (not negative) where ``tail`` ends on the source side and ``head`` on the sink side."""
        for vertex, other, amount in ((tail, head, capacity), (head, tail, 0)):
            self._heads[vertex].append(len(self._to))
            self._to.append(other)
            self._capacity.append(amount)

    def source_side(self) -> set[int]:
        """Vertices on the source's side of the minimum cut that has the fewest of them."""
        while (levels := self._levels())[self.SINK] >= 0:
            self._saturate(levels)
        return {vertex for vertex, level in enumerate(levels) if level >= 0}

    def _levels(self) -> list[int]:
        levels = [-1] * len(self._heads)
        levels[self.SOURCE] = 0
        queue = [self.SOURCE]
        for vertex in queue:
            for edge in self._heads[vertex]:
                head = self._to[edge]
                if self._capacity[edge] > 0 and levels[head] < 0:
                    levels[head] = levels[vertex] + 1
                    queue.append(head)
        return levels

    def _saturate(self, levels: list[int]) -> None:
        """Push flow along shortest paths until every one of them has a full edge (a blocking flow)."""
        following = [0] * len(self._heads)  # edges before this one lead nowhere any more
        path: list[int] = []
        vertex = self.SOURCE
        while True:
            if vertex == self.SINK:
                amount = min(self._capacity[edge] for edge in path)
                for edge in path:
                    self._capacity[edge] -= amount
                    self._capacity[edge ^ 1] += amount
                first_full = next(i for i, edge in enumerate(path) if self._capacity[edge] == 0)
                vertex = self._to[path[first_full] ^ 1]
                del path[first_full:]
                continue
            edges = self._heads[vertex]
            while following[vertex] < len(edges):
                edge = edges[following[vertex]]
                if self._capacity[edge] > 0 and levels[self._to[edge]] == levels[vertex] + 1:
                    break
                following[vertex] += 1
            if following[vertex] < len(edges):
                path.append(edges[following[vertex]])
                vertex = self._to[path[-1]]
            elif path:
                edge = path.pop()
                vertex = self._to[edge ^ 1]
                following[vertex] += 1
            else:
                return

"""Minimum s-t cut by the push-relabel method, highest label first, in pure Python.

Placement asks it which operators run as integers. Its graphs are as deep as networks are, thousands of vertices in a
row, where methods that look for one augmenting path length after the other take quadratic time. Here excess flow from
many vertices travels together.

Source: A. V. Goldberg, R. E. Tarjan, "A New Approach to the Maximum-Flow Problem", JACM 1988; the gap and global
relabelling heuristics are those of B. V. Cherkassky, A. V. Goldberg, "On Implementing the Push-Relabel Method for the
Maximum Flow Problem", Algorithmica 1997. Only the first phase runs: a cut needs no flow, a preflow is enough.
"""

from __future__ import annotations

__all__ = ["MinCut"]


class MinCut:
    """A directed graph with capacities between a source and a sink; both are made with it."""

    SOURCE = 0
    SINK = 1

    def __init__(self) -> None:
        # The graph is kept with its edges turned round, so that the preflow starts at the sink: what can still reach
        # the source in the end is then the smallest source side of all minimum cuts.
        self._edges: list[list[int]] = [[], []]  # edge numbers by vertex; edge ^ 1 leads back
        self._to: list[int] = []
        self._capacity: list[int] = []

    def vertex(self) -> int:
        """A new vertex."""
        self._edges.append([])
        return len(self._edges) - 1

    def edge(self, tail: int, head: int, capacity: int) -> None:
        """Pay ``capacity`` (not negative) where ``tail`` ends on the source side and ``head`` on the sink side."""
        for vertex, other, amount in ((head, tail, capacity), (tail, head, 0)):
            self._edges[vertex].append(len(self._to))
            self._to.append(other)
            self._capacity.append(amount)

    def source_side(self) -> set[int]:
        """Vertices on the source's side of the minimum cut that has the fewest of them."""
        self._push_preflow()
        distance = self._distances()
        return {vertex for vertex, steps in enumerate(distance) if steps < len(distance)}

    def _distances(self) -> list[int]:
        """Residual steps from each vertex to the source; the number of vertices where there is no way."""
        count = len(self._edges)
        distance = [count] * count
        distance[self.SOURCE] = 0
        queue = [self.SOURCE]
        for vertex in queue:
            for edge in self._edges[vertex]:
                origin = self._to[edge]
                if self._capacity[edge ^ 1] > 0 and distance[origin] == count:
                    distance[origin] = distance[vertex] + 1
                    queue.append(origin)
        return distance

    def _push_preflow(self) -> None:
        count = len(self._edges)
        excess = [0] * count
        for edge in self._edges[self.SINK]:
            amount = self._capacity[edge]
            excess[self._to[edge]] += amount
            self._capacity[edge] = 0
            self._capacity[edge ^ 1] += amount
        label, buckets, population = self._start(excess)
        following = [0] * count
        highest, work = count - 1, 0
        while True:
            while highest >= 0 and not buckets[highest]:
                highest -= 1
            if highest < 0:
                return
            vertex = buckets[highest].pop()
            if label[vertex] != highest or excess[vertex] == 0:
                continue  # it was relabelled, or emptied, since it was put there
            work += self._discharge(vertex, excess, label, following, buckets, population)
            highest = min(max(highest, label[vertex]), count - 1)
            if work > 4 * count:
                label, buckets, population = self._start(excess)
                following = [0] * count
                highest, work = count - 1, 0

    def _start(self, excess: list[int]) -> tuple[list[int], list[list[int]], list[int]]:
        """Exact labels, active vertices by label, and how many vertices have each label."""
        count = len(self._edges)
        label = self._distances()
        label[self.SINK] = count
        buckets: list[list[int]] = [[] for _ in range(count + 1)]
        population = [0] * (count + 1)
        for vertex in range(count):
            population[label[vertex]] += 1
            if excess[vertex] > 0 and label[vertex] < count and vertex != self.SOURCE:
                buckets[label[vertex]].append(vertex)
        return label, buckets, population

    def _discharge(
        self,
        vertex: int,
        excess: list[int],
        label: list[int],
        following: list[int],
        buckets: list[list[int]],
        population: list[int],
    ) -> int:
        """Push the excess of ``vertex`` downhill, raising it as needed; returns how many edges were looked at."""
        count, edges, looked = len(self._edges), self._edges[vertex], 0
        while excess[vertex] > 0 and label[vertex] < count:
            if following[vertex] == len(edges):
                looked += len(edges)
                old = label[vertex]
                lowest = min((label[self._to[e]] for e in edges if self._capacity[e] > 0), default=count)
                population[old] -= 1
                label[vertex] = count if population[old] == 0 else min(lowest + 1, count)  # a gap: no way any more
                population[label[vertex]] += 1
                following[vertex] = 0
                continue
            edge = edges[following[vertex]]
            head = self._to[edge]
            if self._capacity[edge] > 0 and label[vertex] == label[head] + 1:
                amount = min(excess[vertex], self._capacity[edge])
                self._capacity[edge] -= amount
                self._capacity[edge ^ 1] += amount
                if excess[head] == 0 and head not in (self.SOURCE, self.SINK):
                    buckets[label[head]].append(head)
                excess[vertex] -= amount
                excess[head] += amount
                if excess[vertex] == 0:
                    break
            following[vertex] += 1
            looked += 1
        return looked

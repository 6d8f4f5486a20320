"""What is worth a place in threadgroup memory: work counted in simple instructions of a thread.

A value is computed again wherever it is needed, unless that takes longer than to compute it once,
to wait at a barrier and to read it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny.elements import IN_ORDER, LAZY, VIEWS, reduced_length
from zmlx.graph.tiny.elementwise import WORK
from zmlx.graph.tiny.literals import WIDE

#: A barrier with what stands around it.
_BARRIER = 80
_LOAD, _READ = 8, 3
#: A step of a reduction across lanes, of which there are five.
_SHUFFLE = 6


class Costs:
    """Decides which values of a program are stored.

    Args:
        nodes: of the program, lowered.
        inputs: values that are in the device's memory.
        outputs: values that are returned.
        threads: of the threadgroup.
        sparing: store only what has to be.

    Attributes:
        stored: values that go to threadgroup memory.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Mapping[Value, str],
        outputs: Sequence[Value],
        threads: int,
        *,
        sparing: bool = False,
    ) -> None:
        self._nodes = nodes
        self._inputs = inputs
        self._threads = threads
        self.stored: dict[Value, None] = {}
        self._reach: dict[Value, dict[Node, int]] = {}
        self._producers = {value: node for node in nodes for value in node.outputs}
        for node in nodes:
            if not self._is_lazy(node):
                self.stored.update(dict.fromkeys(node.outputs))
            if node.op == "Rank":
                self.stored[node.inputs[0]] = None
        for node in () if sparing else nodes:
            for value in node.outputs:
                if value not in self.stored and node.op not in VIEWS and self._pays(value, outputs):
                    self.stored[value] = None

    def _is_lazy(self, node: Node) -> bool:
        if node.op == "Reduce":
            return self._reduces_alone(node)
        return node.op in LAZY

    def _reduces_alone(self, node: Node) -> bool:
        """Whether each thread adds up a result of a reduction by itself."""
        length, results = reduced_length(node), node.outputs[0].size
        if length <= 4 or node.outputs[0].dtype in WIDE:
            return True
        rounds = -(-results // (self._threads // 32))
        together = rounds * (-(-length // 32) * _LOAD + 5 * _SHUFFLE)
        alone = -(-results // self._threads) * length * _LOAD
        return length <= 64 and 2 * alone < together

    def work(self, value: Value) -> int:
        """Return what computing one element takes, with what it needs."""
        node = self._producers.get(value)
        if node is None:
            return _LOAD if value in self._inputs else 0
        if value in self.stored:
            return _READ
        needed: dict[Value, None] = {}
        pending, count = list(node.inputs), self._own(node)
        while pending:
            other = pending.pop()
            if other in needed:
                continue
            needed[other] = None
            maker = self._producers.get(other)
            if maker is None or other in self.stored:
                count += self.work(other)
            else:
                count += self._own(maker)
                pending += maker.inputs
        return count * self._times(node)

    def _own(self, node: Node) -> int:
        if node.op in VIEWS:
            return 0
        return 60 if node.op == "RoPE" else WORK.get(node.op, 1)

    def _times(self, node: Node) -> int:
        """Return how many elements of its inputs an element of a lazy node needs."""
        if node.op == "Reduce":
            return reduced_length(node)
        if node.op == "ScatterAxis":
            return node.inputs[1].shape[int(node.arguments[1])]
        if node.op == "Convolution":
            return node.inputs[1].shape[1]
        return 2 if node.op == "RoPE" else 1

    def _pays(self, value: Value, outputs: Sequence[Value]) -> bool:
        readers = self._readers(value, outputs)
        work = self.work(value)
        again = sum(count * work for count in readers)
        once = self._rounds(value.size) * work + _BARRIER
        return again > once + sum(count * _READ for count in readers)

    def _rounds(self, size: int) -> int:
        return -(-size // self._threads)

    def _readers(self, value: Value, outputs: Sequence[Value]) -> list[int]:
        """Return how often a thread computes a value: for all in its order, and for each other.

        Who reads elements in the order in which they lie finds them in registers when they have
        been computed before; so does who reads the only one.
        """
        factors: dict[Value, int] = {value: 1}
        places = {value}
        shared, found = 0, []
        for node, end in self._ends(value, outputs, factors, places):
            if node is None or self._is_lazy(node):
                rounds = self._rounds(end.size) * factors[end]
                in_place = end in places
            else:
                inner = max((v for v in node.inputs if v in factors), key=factors.__getitem__)
                rounds = self._own_rounds(node) * factors[inner]
                in_place = inner in places and inner.size == value.size
            if in_place:
                shared = max(shared, rounds)
            else:
                found.append(1 if value.size == 1 else rounds)
        return [shared, *found]

    def _ends(
        self,
        value: Value,
        outputs: Sequence[Value],
        factors: dict[Value, int],
        places: set[Value],
    ) -> Iterator[tuple[Node | None, Value]]:
        """Follow a value to all that is stored or returned; note factors, and who is in place."""
        for node in self._nodes:
            times = max((factors.get(v, 0) for v in node.inputs), default=0)
            if not times or value in node.outputs:
                continue
            if not self._is_lazy(node):
                yield node, node.outputs[0]
                continue
            for output in node.outputs:
                factors[output] = times * self._times(node)
                plain = node.op in IN_ORDER and output.size == value.size
                if plain and any(v in places for v in node.inputs):
                    places.add(output)
                if output in self.stored:
                    yield node, output
                    del factors[output]
        for output in outputs:
            if output in factors and output not in self.stored:
                yield None, output

    def _own_rounds(self, node: Node) -> int:
        """Return how many elements of its input a thread of a collective operation reads."""
        source = node.inputs[0]
        if node.op == "Reduce" and node.outputs[0].size == 1:
            return self._rounds(source.size)
        rows = max(1, node.outputs[0].size if node.op != "Rank" else source.size)
        groups = max(1, min(rows, self._threads // 32))
        return -(-source.size // (groups * 32)) * (2 if node.op == "Scan" else 1)

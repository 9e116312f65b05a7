"""Several calls that are no sums of spikes are one analog function."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from snnconv.program import Step
from snnconv.rewrite.rearrangements import PERMUTATIONS, RESHAPES, SHUFFLES
from snnconv.rewrite.tools import Values, argument, known_values, name_of, path_of, put
from snnconv.rewrite.translate import Program, Unknown

# What nothing but a program can compute, of images and vectors too.
_ONLY_HERE = (
    "addcmul", "amax", "amin", "exp", "group_norm", "layer_norm", "matmul", "max", "maximum",
    "mean", "norm", "normalize", "pow", "rsqrt", "softmax", "Softmax", "sqrt", "square", "stack",
    "sum", "var", "linalg_vector_norm", "squeeze", "unsqueeze", *PERMUTATIONS, *SHUFFLES,
)  # fmt: skip
_OF_TWO = ("add", "add_", "iadd", "sub", "sub_", "isub", "truediv", "div", "div_", "itruediv")


class Composite(nn.Module):
    """A part of the model's graph with one result, `[N, C, ...]`, and the same as a program.

    `label` names the calls it is there for.
    """

    def __init__(
        self, graph: fx.GraphModule, steps: tuple[Step, ...], constants: list[Tensor], label: str
    ) -> None:
        """Hold the part as the model computes it."""
        super().__init__()
        self.graph, self.steps, self.constants, self.label = graph, steps, tuple(constants), label

    def forward(self, *inputs: Tensor) -> Any:
        """Compute what the model does."""
        return self.graph(*inputs)


def composites(module: fx.GraphModule, values: Values) -> bool:
    """Put calls that are no sums of spikes, up to the next image or vector, into one `Composite`.

    A call is taken in if only the part reads it, or if its result is neither an image nor a vector.
    """
    known = known_values(module)
    changed = False
    taken: set[fx.Node] = set()
    for node in reversed(list(module.graph.nodes)):
        if node in known or node in taken or not _needs_program(module, node, values, known):
            continue
        if len(values.shapes.get(node.name, ())) not in (1, 3) or not node.users:
            continue
        part = _part(module, node, values, known)
        program = Program(module, values, known)
        inputs = _inputs(part, values, known)
        if not inputs or any(len(values.shapes[n.name]) not in (1, 3) for n in inputs):
            continue
        program.names = {n: f"x{i}" for i, n in enumerate(inputs)}
        for member in part:
            program.add(member)
        taken |= set(part)
        _put(module, node, part, inputs, program, values, known)
        changed = True
    return changed


def _part(
    module: fx.GraphModule, last: fx.Node, values: Values, known: dict[fx.Node, Any]
) -> list[fx.Node]:
    """Return the nodes of a part in the order of the graph, the last of them given."""
    if not _sayable(module, last, values, known):
        return []
    part, waiting = {last}, [last]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in part or source in known or source.name not in values.shapes:
                continue
            apart = len(values.shapes[source.name]) not in (1, 3)
            alone = all(user in part for user in source.users)
            if (apart or alone) and _sayable(module, source, values, known):
                part.add(source)
                waiting.append(source)
    ordered = [n for n in module.graph.nodes if n in part]
    for node in ordered:  # what can stand outside, in front
        if not _needs_program(module, node, values, known) and not part & set(node.all_input_nodes):
            part.remove(node)
    return [n for n in ordered if n in part]


def _sayable(
    module: fx.GraphModule, node: fx.Node, values: Values, known: dict[fx.Node, Any]
) -> bool:
    program = Program(module, values, known)
    program.names = {n: "x" for n in node.all_input_nodes if n.name in values.shapes}
    program.names = {n: name for n, name in program.names.items() if n not in known}
    try:
        program.add(node)
    except Unknown:
        return False
    return node.op.startswith("call") and _without_sizes(module, node, values) is not None


def _needs_program(
    module: fx.GraphModule, node: fx.Node, values: Values, known: dict[fx.Node, Any]
) -> bool:
    """Return whether no neuron, synapse or map, and no single analog function, can stand for it."""
    if not node.op.startswith("call") or node.name not in values.shapes:
        return False
    sources = [n for n in node.all_input_nodes if n.name in values.shapes and n not in known]
    shapes = [values.shapes[n.name] for n in sources]
    out = values.shapes[node.name]
    if any(len(shape) not in (1, 3) for shape in (*shapes, out)):
        return True
    name = name_of(module, node)
    if name in RESHAPES:
        return len(out) != 1
    if name == "expand":
        return bool(shapes) and shapes[0][0] != out[0]
    if name == "cat":
        return bool(argument(node, 1, "dim", 0) % (len(out) + 1) != 1)
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return not all(isinstance(i, slice) or i is Ellipsis for i in index)
    if name in _OF_TWO and len(sources) == 2:
        return shapes[0] != shapes[1] or "div" in name
    return name in _ONLY_HERE


def _inputs(part: list[fx.Node], values: Values, known: dict[fx.Node, Any]) -> list[fx.Node]:
    """Return what a part reads, each once."""
    read = [n for node in part for n in node.all_input_nodes if n.name in values.shapes]
    return list(dict.fromkeys(n for n in read if n not in known and n not in part))


def _without_sizes(module: fx.GraphModule, node: fx.Node, values: Values) -> tuple[Any, Any] | None:
    """Return a node's arguments without sizes that are computed, the batch's length being -1."""
    if all(n.name in values.shapes or n.op == "get_attr" for n in node.all_input_nodes):
        return node.args, node.kwargs
    name = name_of(module, node)
    if name in RESHAPES or name == "expand":
        return (node.args[0], (-1, *values.shapes[node.name])), {}
    return None


def _put(
    module: fx.GraphModule,
    last: fx.Node,
    part: list[fx.Node],
    inputs: list[fx.Node],
    program: Program,
    values: Values,
    known: dict[fx.Node, Any],
) -> None:
    """Put a composite in place of a part."""
    graph = fx.Graph()
    copies = {n: graph.placeholder(f"x{i}") for i, n in enumerate(inputs)}

    def copy(node: fx.Node) -> fx.Node:
        """Copy a constant with all that it is made of."""
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in part:
        arguments = _without_sizes(module, node, values)
        assert arguments is not None
        args, kwargs = fx.node.map_arg(arguments, copy)
        target = "reshape" if arguments[0] is not node.args else node.target
        op = "call_method" if arguments[0] is not node.args else node.op
        if name_of(module, node) == "expand":
            target = "expand" if op == "call_method" else target
        copies[node] = graph.create_node(op, target, tuple(args), dict(kwargs))
    graph.output(copies[last])
    names = [name_of(module, n) for n in part if _needs_program(module, n, values, known)]
    moves = {*RESHAPES, *PERMUTATIONS, "getitem", "expand", "expand_as", "squeeze", "unsqueeze"}
    telling = [n for n in dict.fromkeys(names) if n not in moves] or list(dict.fromkeys(names))
    made = Composite(
        fx.GraphModule(module, graph), tuple(program.steps), program.constants, "+".join(telling)
    )
    path = put(module, path_of(last, "analog"), made)
    with module.graph.inserting_before(last):
        new = module.graph.call_module(path, tuple(inputs))
    new.meta = dict(last.meta)
    values.shapes[new.name] = values.shapes[last.name]
    last.replace_all_uses_with(new)

"""ONNX graphs: of one plain net, and of several depths in one graph that stores what they share once.

The graph of several depths is that of the deepest net, with an input `depth`. Where a constant differs by depth, in the
statistics of norms, in scales and biases of int8, or in weights that are private, a table has a row for each depth and
the input picks the row. A block that some depth leaves out stands in an `If`. What depths share stands once.
"""
import ast
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import helper, numpy_helper
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, LiftConstantsToInitializersPass
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import nn

from .formats import example_of

__all__ = ['merge_nets', 'trace_net']


_SCOPES = 'pkg.torch.onnx.name_scopes'  # names of the modules that a node comes from, the outermost first
_TO_NHWC, _TO_NCHW, _SAME = (0, 2, 3, 1), (0, 3, 1, 2), None


def trace_net(net: nn.Module, images: torch.Tensor, dynamic_batch: bool, fold_norms: bool = True) -> onnx.ModelProto:
    """Write a plain net as an ONNX graph whose nodes have the names of the modules that they come from.

    Args:
        net: Plain net in eval mode.
        images: Images, [N, C, H, W].
        dynamic_batch: Whether the graph takes any number of images, and not one alone.
        fold_norms: Whether batch norms become part of the convolutions before them.
    """
    example, shapes = example_of(images, dynamic_batch)
    graph = torch.onnx.export(
        net, example, dynamo=True, dynamic_shapes=shapes, input_names=['images'], output_names=['logits'],
        verbose=False, optimize=fold_norms,
    ).model
    if not fold_norms:  # what `optimize` does besides
        fold_constants(graph)
        remove_unused_nodes(graph)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    counts = Counter()
    for node in graph.graph:
        module = ast.literal_eval(node.metadata_props[_SCOPES])[-2]
        name = f'{module}.{node.op_type}'
        counts[name] += 1
        node.name = name if counts[name] == 1 else f'{name}{counts[name]}'
        for i, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f'{node.name}:{i}' if i else node.name
    ClearMetadataAndDocStringPass()(graph)
    return onnx_ir.to_proto(graph)


def merge_nets(nets: Mapping[int, onnx.ModelProto]) -> onnx.ModelProto:
    """Merge the graphs of several depths into one with the inputs `images` and `depth`, an int64 scalar.

    It runs the deepest net that is not deeper than `depth`, and the shallowest if there is none.

    Args:
        nets: Graphs of `trace_net` by depth, the deepest first, all with norms that are not folded; or all of int8,
            with the same integers.
    """
    return _Merger(nets).merge()


class _Merger:
    """The state of one merge."""

    def __init__(self, nets: Mapping[int, onnx.ModelProto]) -> None:
        self.nets = nets
        self.full, *_ = nets.values()
        self.constants = [{t.name: numpy_helper.to_array(t) for t in net.graph.initializer} for net in nets.values()]
        self.left_out = _find_left_out([net.graph for net in nets.values()])
        blocks = [self._group_by_block(net.graph) for net in nets.values()]
        self.present: dict[str | None, tuple[bool, ...]] = {}  # by block: which depths run it
        self.same: dict[str, list[onnx.NodeProto | None]] = {}  # by name of a node: what it is at every depth
        for block, nodes in blocks[0].items():
            versions = [block_nodes.get(block) for block_nodes in blocks]
            self.present[block] = tuple(version is not None for version in versions)
            for version in filter(None, versions):
                assert [node.op_type for node in version] == [node.op_type for node in nodes], block
            for i, node in enumerate(nodes):
                self.same[node.name] = [version and version[i] for version in versions]
        self.is_int8 = any(node.op_type == 'QLinearConv' for node in self.full.graph.node)
        self.maps = _find_maps(self.full.graph)
        self.initializers: list[onnx.TensorProto] = []
        self.vectors: dict[str, list[tuple[str, list[np.ndarray]]]] = defaultdict(list)  # by type
        self.scalars: dict[tuple, str] = {}  # name by type and values by depth
        self.matrices: list[tuple[str, list[np.ndarray]]] = []
        self.small: dict[tuple, str] = {}  # name of a constant by type, shape and content

    def merge(self) -> onnx.ModelProto:
        graph = self.full.graph
        owners = self._block_by_node(graph)
        runs = [
            (present, list(nodes))
            for present, nodes in itertools.groupby(graph.node, key=lambda node: self.present[owners[node.name]])
        ]
        nodes = []
        for i, (present, group) in enumerate(runs):
            group = [self._convert(node) for node in group]
            if all(present):
                nodes += group
            else:
                used_later = {name for _, later in runs[i + 1:] for node in later for name in node.input}
                nodes += self._run_if(present, group, used_later)
        merged = helper.make_graph(
            [*self._pick_rows(), *nodes], graph.name,
            [*graph.input, helper.make_tensor_value_info('depth', onnx.TensorProto.INT64, [])], graph.output,
            self.initializers)
        return helper.make_model(merged, opset_imports=self.full.opset_import, ir_version=self.full.ir_version)

    def _convert(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Give a node its constants: as they are if equal at all depths, else by the name of what is picked."""
        converted = onnx.NodeProto()
        converted.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name in self.constants[0]:
                values = [
                    None if version is None else constants[version.input[i]]
                    for version, constants in zip(self.same[node.name], self.constants, strict=True)
                ]
                converted.input[i] = self._add_constant(f'{node.name}/{i}', values)
        return converted

    def _add_constant(self, name: str, values: list[np.ndarray | None]) -> str:
        known = [value for value in values if value is not None]
        if all(np.array_equal(value, known[0]) for value in known):
            if known[0].ndim <= 1:  # scales and zero points are often the same
                key = known[0].dtype.name, known[0].shape, known[0].tobytes()
                if self.small.setdefault(key, name) != name:
                    return self.small[key]
            # always in the outermost graph: of weights that stand in a branch, onnxruntime keeps a second copy
            self.initializers.append(numpy_helper.from_array(known[0], name))
            return name
        values = [known[0] if value is None else value for value in values]
        if known[0].ndim == 0:  # often the same scale
            return self.scalars.setdefault((known[0].dtype.name, *map(np.ndarray.item, values)), name)
        if known[0].ndim > 1:
            self.matrices.append((name, values))
            return name
        self.vectors[known[0].dtype.name].append((name, values))
        return name

    def _block_by_node(self, graph: onnx.GraphProto) -> dict[str, str | None]:
        """Find the block of every node that some depth leaves out; None for nodes that all depths run."""
        consumers = {name: node for node in reversed(graph.node) for name in node.input}
        blocks = {}
        for node in graph.node:
            user = node
            while user and user.op_type in ('QuantizeLinear', 'DequantizeLinear'):  # named by the value, and run for
                user = consumers.get(user.output[0])  # whatever needs it
            names = _modules_above(user) if user else ()
            blocks[node.name] = next(filter(self.left_out.__contains__, names), None)
        return blocks

    def _group_by_block(self, graph: onnx.GraphProto) -> dict[str | None, list[onnx.NodeProto]]:
        groups = defaultdict(list)
        owners = self._block_by_node(graph)
        for node in graph.node:
            groups[owners[node.name]].append(node)
        return groups

    def _run_if(
            self,
            present: tuple[bool, ...],
            nodes: list[onnx.NodeProto],
            used_later: set[str],
    ) -> Iterator[onnx.NodeProto]:
        """Run nodes, which map one value to another of its shape, at some depths only."""
        produced = {name for node in nodes for name in node.output}
        source, = {name for node in nodes for name in node.input if name in self.maps} - produced
        target, = produced & used_later
        inside, result = f'{target}/in', f'{target}/out'
        for node in nodes:
            node.input[:] = [{source: inside, target: result}.get(name, name) for name in node.input]
            node.output[:] = [result if name == target else name for name in node.output]
        # onnxruntime's int8 kernels take channels last. With channels last outside the branches, its optimizer finds
        # pairs of transpositions that cancel on both sides of a branch, and else would make 4 that stay
        to_branch, from_branch = (_TO_NHWC, _TO_NCHW) if self.is_int8 else (_SAME, _SAME)
        then = helper.make_graph(
            [_transpose(f'{target}/source', inside, from_branch), *nodes,
             _transpose(result, f'{target}/then', to_branch)],
            'run', [], [helper.make_empty_tensor_value_info(f'{target}/then')])
        otherwise = helper.make_graph(
            [helper.make_node('Identity', [f'{target}/source'], [f'{target}/else'])],
            'leave_out', [], [helper.make_empty_tensor_value_info(f'{target}/else')])
        condition = self._add_constant(f'{target}/run', [np.array(value) for value in present])
        yield _transpose(source, f'{target}/source', to_branch)
        yield helper.make_node(
            'If', [condition], [f'{target}/if'], name=f'{target}/if', then_branch=then, else_branch=otherwise)
        yield _transpose(f'{target}/if', target, from_branch)

    def _pick_rows(self) -> Iterator[onnx.NodeProto]:
        """Pick what differs by depth: a Gather for each scalar and matrix, a Gather and a Split for all vectors."""
        def add(name: str, value: np.ndarray) -> str:
            self.initializers.append(numpy_helper.from_array(value, name))
            return name

        deeper = add('pick/deeper_depths', np.array([*self.nets][:-1]))
        yield helper.make_node('Greater', [deeper, 'depth'], ['pick/is_deeper'])
        yield helper.make_node('Cast', ['pick/is_deeper'], ['pick/is_deeper_int'], to=onnx.TensorProto.INT64)
        yield helper.make_node('ReduceSum', ['pick/is_deeper_int'], ['pick/row'], keepdims=0)
        for (dtype, *values), name in self.scalars.items():
            table = add(f'{name}/table', np.array(values, dtype))
            yield helper.make_node('Gather', [table, 'pick/row'], [name])
        for name, values in self.matrices:
            yield helper.make_node('Gather', [add(f'{name}/table', np.stack(values)), 'pick/row'], [name])
        for dtype, picks in self.vectors.items():
            names, vectors = zip(*picks, strict=True)
            table = add(f'pick/{dtype}_table', np.stack([np.concatenate(row) for row in zip(*vectors, strict=True)]))
            sizes = add(f'pick/{dtype}_sizes', np.array([values[0].size for values in vectors]))
            yield helper.make_node('Gather', [table, 'pick/row'], [f'pick/{dtype}'])
            yield helper.make_node('Split', [f'pick/{dtype}', sizes], names)


def _transpose(source: str, target: str, order: Sequence[int] | None) -> onnx.NodeProto:
    if order is None:
        return helper.make_node('Identity', [source], [target])
    return helper.make_node('Transpose', [source], [target], perm=order)


def _modules_above(node: onnx.NodeProto) -> list[str]:
    """List the names of the modules that a node is in, the outermost first."""
    return list(itertools.accumulate(node.name.split('.')[:-1], '{}.{}'.format))


def _find_left_out(graphs: Sequence[onnx.GraphProto]) -> set[str]:
    """Find the blocks of the first graph that another leaves out: the outermost modules that it has no node of."""
    full, *others = [[_modules_above(node) for node in graph.node] for graph in graphs]
    return {
        next(name for name in names if name not in known)
        for other in others for known in [set().union(*other)] for names in full if not known.issuperset(names)}


def _find_maps(graph: onnx.GraphProto) -> set[str]:
    """Find what is computed from the images, but for what is computed from their number alone."""
    maps = {'images'}
    for node in graph.node:
        if node.op_type != 'Shape' and maps.intersection(node.input):
            maps.update(node.output)
    return maps

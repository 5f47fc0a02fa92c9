"""The weights of a full-net and its sub-nets: which modules they share, and what each has for itself.

State dicts are in `state_dict.py`, the forward and the extraction of plain nets in `dynamic_depth.py`.
"""
import copy
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.resnet import Bottleneck
from torch import nn

from ..utils.errors import InputError
from ..utils.modules import find_norms

__all__ = ['Blocks', 'SharedWeightsMixin', 'SubNetModule', 'SubNets', 'count_shared_blocks']


Blocks = tuple[int, ...]
REFUSAL = 'convert what extract(depth) returns, not a model of several depths'


class SubNetModule(nn.Module):
    """A module of the full-net as a sub-net runs it: the same module but for the running statistics of its norms.

    Only these statistics are registered here (and scale and shift where a sub-net has its own). Everything else is
    looked up in the full-net's module whenever this one runs, and stands in the module tree once. So nothing can come
    apart: whatever replaces, freezes, converts or moves a module or a parameter of the full-net does so for all depths.
    """

    def __init__(self, parent: nn.Module, name: str, shared_affine: bool) -> None:
        """Begin with copies of the full-net's statistics.

        Args:
            parent: Parent, in the full-net, of the module.
            name: Name of the module in its parent.
            shared_affine: Whether norms use the full-net's scale and shift, rather than copies.
        """
        super().__init__()
        vars(self)['_place'] = (parent, name)  # not as an attribute, which would register the parent here
        self._is_norm = False
        original = self.original
        self.training = original.training
        self._is_norm = original in find_norms(original)
        if self._is_norm:
            own = dict(original.named_buffers(recurse=False))
            if not shared_affine:
                own |= original.named_parameters(recurse=False)
            for name, tensor in copy.deepcopy(own).items():
                (self._parameters if isinstance(tensor, nn.Parameter) else self._buffers)[name] = tensor
        for name, child in original.named_children():
            if find_norms(child):
                self.add_module(name, SubNetModule(original, name, shared_affine))

    @property
    def parent(self) -> nn.Module:
        """Parent, in the full-net, of the module."""
        return self._place[0]

    @property
    def original(self) -> nn.Module:
        """The module of the full-net.

        Raises:
            InputError: If something has replaced a module so that it has not what differs by depth.
        """
        parent, name = self._place
        module = parent._modules[name]
        for own in ('running_mean', *self._parameters) if self._is_norm else self._modules:
            if all(held.get(own) is None for held in (module._buffers, module._parameters, module._modules)):
                raise InputError(
                    f'{type(module).__name__} in the place of a module has no {own}, which differs by depth: {REFUSAL}')
        return module

    @property
    def momentum(self) -> float | None:
        """Momentum of a norm's statistics, which is the full-net's."""
        return self.original.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self.original.momentum = value

    def reset_running_stats(self) -> None:
        """Reset the statistics of a norm; any other module has none."""
        if self._is_norm:
            self._assemble().reset_running_stats()

    def _assemble(self) -> nn.Module:
        """Put together, for one call, an instance of the original's class that has what is registered here."""
        original = self.original
        module = object.__new__(type(original))
        state = vars(module)
        state.update(vars(original))
        state['training'] = self.training
        parameters, buffers, modules = self._parameters, self._buffers, self._modules
        if parameters and 'weight' in original._buffers:  # scale and shift were frozen
            parameters, buffers = {}, buffers | {name: p.detach() for name, p in parameters.items()}
        if parameters:
            state['_parameters'] = original._parameters | parameters
        if buffers:
            state['_buffers'] = original._buffers | buffers
        if modules:
            state['_modules'] = original._modules | {
                # a list of modules is not called but iterated over
                name: child._assemble() if isinstance(child.original, (nn.ModuleList, nn.ModuleDict)) else child
                for name, child in modules.items()
            }
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the full-net's module computes, by the statistics of this one."""
        original, module = self.original, self._assemble()
        if self._is_norm:
            for hook in original._forward_pre_hooks.values():  # by which torch.nn.utils.prune masks weights
                hook(module, (x,))
            if isinstance(x, torch.fx.Proxy):  # torch.fx does not trace into norms of torch.nn, whose check it cannot
                vars(module)['_check_input_dim'] = lambda x: None
        return type(original).forward(module, x)

    def extract(self) -> nn.Module:
        """Copy the module with the statistics of this one."""
        module = self._assemble()
        vars(module)['_modules'] = module._modules | {name: child.extract() for name, child in self.named_children()}
        return copy.deepcopy(module)


class SubNets(nn.ModuleDict):
    """What sub-nets have for themselves, by depth, stage and place: the blocks whose statistics are their own.

    A block that several sub-nets run stands with the deepest of them; what is the full-net's is not here.

    Attributes:
        trained: Which depths were trained, bool, in the order of the model's `depths`. It is kept with the weights.
    """

    trained: torch.Tensor

    def __init__(self, device: torch.device) -> None:
        """Begin without sub-nets.

        Args:
            device: Device of the model.
        """
        super().__init__()
        self.register_buffer('trained', torch.zeros(1, dtype=torch.bool, device=device))


def count_shared_blocks(blocks: Blocks, other: Blocks) -> int:
    """Count the blocks that two nets begin with, up to the block behind which their paths part.

    Args:
        blocks: Number of blocks in every stage of a net.
        other: The same of the other net.
    """
    count = 0
    for mine, theirs in zip(blocks, other, strict=True):
        count += min(mine, theirs)
        if mine != theirs:
            break
    return count


class SharedWeightsMixin:
    """Gives a class of the timm ResNet family sub-nets in its own weights, see `DynamicDepthMixin`."""

    def __init__(
            self,
            block: type[nn.Module],
            layers: Sequence[int],
            subnets: Sequence[Sequence[int]] = (),
            depth: int | None = None,
            shared_affine: bool = True,
            **kwargs: Any,
    ) -> None:
        """Build the full-net and its sub-nets.

        Args:
            block: Residual block class, timm's `BasicBlock` or `Bottleneck`.
            layers: Number of blocks per stage of the full-net.
            subnets: Number of blocks per stage of every sub-net, between 1 and the full-net's.
            depth: The depth that `forward` runs when it is given none. The full-net's when None.
            shared_affine: Whether a norm with statistics of its own still shares scale and shift with the full-net.
                If so, the model has exactly the parameters of the full-net.
            **kwargs: Arguments of the parent class.

        Raises:
            InputError: If a layer has no channels, a classifier no pooling before it, the blocks of a sub-net are not
                within the full-net's, two nets have the same depth, or no net has the default depth asked for.
        """
        super().__init__(block, layers, **kwargs)
        if self.num_classes and self.global_pool.is_identity():
            raise InputError("global_pool must not be '' where there is a classifier, num_classes of at least 1")
        empty = [name for name, p in self.named_parameters() if not p.numel()]
        if empty:
            raise InputError(f'channels must be at least 1 everywhere, got none in {empty[0]!r}')
        self._plain_args = {k: v for k, v in kwargs.items() if k not in ('device', 'dtype')} | {'block': block}
        self._layers_per_block = 3 if issubclass(block, Bottleneck) else 2
        self._blocks: dict[int, Blocks] = {self._depth_of(layers): tuple(layers)}
        self.shared_affine = shared_affine
        self.subnets = SubNets(next(self.parameters()).device)
        for blocks in subnets:
            self.add_subnet(blocks)
        self.default_depth = self.depths[0]
        self.default_depth = self.resolve_depth(depth)

    @property
    def depths(self) -> tuple[int, ...]:
        """All depths, the full-net's first and the others in descending order."""
        return tuple(self._blocks)

    @property
    def trained_depths(self) -> tuple[int, ...]:
        """The depths that were trained or calibrated, kept with the weights.

        A depth counts as trained once a training forward with gradients has run it, or `calibrate_bn`, or once it was
        loaded from weights of which that is true. A stock checkpoint trains the full-net only.
        """
        trained = self.subnets.trained
        return () if trained.is_meta else tuple(d for d, t in zip(self.depths, trained.tolist(), strict=True) if t)

    def mark_trained(self, depths: Sequence[int]) -> None:
        """Add depths to `trained_depths`; training and calibration do so by themselves."""
        for depth in depths:
            self.subnets.trained[self.depths.index(depth)] = True

    def blocks(self, depth: int | None) -> Blocks:
        """Number of blocks in every stage at a depth, the default depth if None.

        Raises:
            InputError: If the model has no such depth.
        """
        return self._blocks[self.resolve_depth(depth)]

    def temperature(self, depth: int | None) -> float:
        """Temperature that was fitted to a depth of these very weights and saved with them, 1.0 if none was.

        `(model(x, depth=26) / model.temperature(26)).softmax(-1)` are calibrated probabilities.

        Raises:
            InputError: If the model has no such depth.
        """
        depth = self.resolve_depth(depth)
        results = getattr(self, 'saved_results', ())
        return next((row['temperature'] for row in results if row['depth'] == depth and 'temperature' in row), 1.0)

    def resolve_depth(self, depth: int | None) -> int:
        """Resolve one depth, None being the default.

        Raises:
            InputError: If the model has no such depth.
        """
        depths, single = self.resolve_depths(depth)
        if not single:
            raise InputError(f'one depth of {self.depths} is expected here, got {reprlib.repr(depth)}')
        return depths[0]

    def resolve_depths(self, depth: int | str | Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
        """Resolve the `depth` argument of `forward`.

        Returns:
            Depths in descending order, and whether one depth as such was asked for.

        Raises:
            InputError: If the model has no such depth.
        """
        if depth is None or isinstance(depth, torch.fx.Proxy):
            return (self.default_depth,), True
        if isinstance(depth, str) and depth == 'all':
            return self.depths, False
        single = not isinstance(depth, (tuple, list))
        wanted = (depth,) if single else depth
        # compared one by one, not looked up: torch.compile may hand in a symbolic integer, which this makes a constant
        valid = all(isinstance(w, int) and not isinstance(w, bool) for w in wanted)
        depths = tuple(d for d in self.depths if any(d == w for w in wanted)) if valid else ()
        if not depths or len(depths) < len(wanted):
            raise InputError(
                f"depth must be of {self.depths}, a sequence of these, or 'all', got {reprlib.repr(depth)}")
        return depths, single

    def path(self, depth: int) -> list[nn.Module]:
        """List the residual blocks that a depth runs, in order; a block that several depths run is one object.

        Raises:
            InputError: If the model has no such depth.
        """
        return self._path(self.resolve_depth(depth))

    def path_norms(self, depth: int) -> list[nn.Module]:
        """List the modules with running statistics that a forward at one depth goes through.

        Raises:
            InputError: If the model has no such depth.
        """
        return [norm for part in (self.conv1, self.bn1, self.maxpool, *self.path(depth)) for norm in find_norms(part)]

    def count_shared(self, depth: int, other: int) -> int:
        """Count the blocks that two depths begin with: the same ones, which compute the same maps of the same images.

        Raises:
            InputError: If the model has no such depth.
        """
        return count_shared_blocks(self.blocks(depth), self.blocks(other))

    def add_subnet(self, blocks: Sequence[int]) -> int:
        """Add a sub-net, its statistics beginning as copies of the full-net's.

        Nothing changes for the other depths. The new one is untrained until it is trained or calibrated.

        Args:
            blocks: Number of blocks per stage, between 1 and the full-net's.

        Returns:
            The depth of the new sub-net.

        Raises:
            InputError: If the blocks are not within the full-net's, or the model has a net of that depth.
        """
        full = self._blocks[self.depths[0]]
        valid = isinstance(blocks, (tuple, list)) and len(blocks) == len(full) and all(
            type(n) is int and 1 <= n <= most for n, most in zip(blocks, full, strict=True))
        if not valid:
            raise InputError(
                f'blocks of a sub-net must be {len(full)} integers, from 1 up to {full}, got {reprlib.repr(blocks)}')
        blocks, depth = tuple(blocks), self._depth_of(blocks)
        if depth in self._blocks:
            raise InputError(
                f'sub-net {blocks} has depth {depth}, which names the net {self._blocks[depth]} already; '
                f'depths are {self.depths}'
            )

        # A block is the same for two nets where their paths to it are: that is what it is known by here
        known = {node: block for d in self.depths for node, block in zip(self._nodes(d), self._path(d), strict=True)}
        trained = dict(zip(self.depths, self.subnets.trained, strict=True))
        trained[depth] = torch.zeros_like(self.subnets.trained[0])
        self._blocks = dict(sorted({**self._blocks, depth: blocks}.items(), reverse=True))
        self.subnets.clear()
        for d in self.depths[1:]:
            net = nn.ModuleDict()
            for (path, s, i) in self._nodes(d):
                if self._owner(path, s, i) == d:
                    name, place = f'layer{s + 1}', str(i)
                    if name not in net:
                        net[name] = nn.ModuleDict()
                    net[name][place] = known.get((path, s, i)) or SubNetModule(
                        getattr(self, name), place, self.shared_affine)
            net.training = self.training
            self.subnets[str(d)] = net
        self.subnets.trained = torch.stack([trained[d] for d in self.depths])
        # timm saves these arguments with the weights: the file then rebuilds this model whatever the defaults are
        subnets = [list(self._blocks[d]) for d in self.depths[1:]]
        self._model_args = dict(getattr(self, '_model_args', {}), subnets=subnets)
        return depth

    def _depth_of(self, blocks: Sequence[int]) -> int:
        return sum(blocks) * self._layers_per_block + 2

    def _nodes(self, depth: int) -> list[tuple[Blocks, int, int]]:
        """By what the blocks of a depth are known: the blocks of all earlier stages, the stage, and the place in it."""
        blocks = self._blocks[depth]
        return [(blocks[:s], s, i) for s, count in enumerate(blocks) for i in range(count)]

    def _owner(self, path: Blocks, stage: int, place: int) -> int:
        """The deepest net that runs a block: it has the block, the others use it."""
        return next(d for d, blocks in self._blocks.items() if blocks[:stage] == path and place < blocks[stage])

    def _block_name(self, path: Blocks, stage: int, place: int) -> str:
        owner, name = self._owner(path, stage, place), f'layer{stage + 1}.{place}'
        return name if owner == self.depths[0] else f'subnets.{owner}.{name}'

    def _path(self, depth: int) -> list[nn.Module]:
        full, blocks, path = self._blocks[self.depths[0]], self._blocks[depth], []
        for s, count in enumerate(blocks):
            name = f'layer{s + 1}'
            stage = getattr(self, name)
            if blocks[:s] == full[:s]:
                mine, theirs = list(stage.children())[:count], stage
            else:
                mine = [self.subnets[str(self._owner(blocks[:s], s, i))][name][str(i)] for i in range(count)]
                theirs = mine[0].parent
            if theirs is not stage or not isinstance(stage, nn.Sequential):
                raise InputError(
                    f'{type(stage).__name__} in the place of {name} is not the stage that the depths share: {REFUSAL}')
            path += mine
        return path

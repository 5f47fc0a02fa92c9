"""The weights of a full-net and its sub-nets: which modules they share, and what each has for itself.

State dicts are in `state_dict.py`, the forward and the extraction of plain nets in `dynamic_depth.py`.
"""
import copy
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..utils.errors import InputError
from ..utils.modules import find_norms
from ..utils.schema import brief

__all__ = [
    'PRIVATE', 'Blocks', 'Node', 'SharedWeightsMixin', 'SubNetModule', 'SubNets', 'count_resnet_layers',
    'count_shared_blocks',
]


Blocks = tuple[int, ...]
Node = tuple[Blocks, str]  # the blocks of all earlier stages, and the name of a module of the full-net
_NEW = vars(nn.Module())  # what every module begins with; torch.compile does not trace the constructor
# torch.compile of 2.9 to 2.11, where it was tried, reads what a module has by names alone; that of 2.14 copies it whole
_BY_NAMES = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 14)
PRIVATE = 'affine', 'final_norm', 'classifier', 'conv'  # what sub-nets may have for themselves
REFUSAL = 'convert what extract(depth) returns, not a model of several depths'


class SubNetModule(nn.Module):
    """A module of the full-net as a sub-net runs it: the same module but for what its norms have for themselves.

    Only running statistics are registered here, and parameters that a sub-net has for itself. Everything else is
    looked up in the full-net's module whenever this one runs, and stands in the module tree once. So nothing can come
    apart: whatever replaces, freezes, converts or moves a module or a parameter of the full-net does so for all depths.
    """

    def __init__(self, model: 'SharedWeightsMixin', name: str) -> None:
        """Begin with copies of what the full-net has.

        Args:
            model: The model.
            name: Name of the module in the full-net.
        """
        super().__init__()
        vars(self)['_place'] = (model, name)  # not as an attribute, which would register the model here
        self._is_own = False
        original = self.original
        self.training = original.training
        vars(self)['_names'] = tuple(vars(original))
        self._is_own = original in model.find_own(name)
        if self._is_own:
            own = dict(original.named_buffers(recurse=False))
            if not own or 'affine' in model.private:
                own |= original.named_parameters(recurse=False)
            for key, tensor in copy.deepcopy(own).items():
                (self._parameters if isinstance(tensor, nn.Parameter) else self._buffers)[key] = tensor
        for key, _ in original.named_children():
            if model.find_own(f'{name}.{key}'):
                self.add_module(key, SubNetModule(model, f'{name}.{key}'))

    @property
    def original(self) -> nn.Module:
        """The module of the full-net.

        Raises:
            InputError: If something has replaced a module so that it has not what differs by depth.
        """
        model, name = self._place
        module = model._find(name)
        statistics = ('running_mean',) if self._buffers else ()
        for own in (*statistics, *self._parameters, *self._modules):
            if all(held.get(own) is None for held in (module._buffers, module._parameters, module._modules)):
                raise InputError(
                    f'{type(module).__name__} in the place of {name} has no {own}, which differs by depth: {REFUSAL}')
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
        if self._buffers:
            self._assemble().reset_running_stats()

    def _assemble(self) -> nn.Module:
        """Put together, for one call, an instance of the original's class that has what is registered here."""
        original = self.original
        module = object.__new__(type(original))
        state = vars(module)
        if _BY_NAMES and torch.compiler.is_compiling():
            for name in self._names:
                state[name] = vars(original)[name]
        else:
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

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Compute what the full-net's module computes, by the statistics of this one."""
        module = self._assemble()
        if self._is_own:
            if module._forward_pre_hooks or module._forward_hooks:  # by which torch.nn.utils.prune masks weights
                return module(x, **kwargs)
            if isinstance(x, torch.fx.Proxy):  # torch.fx does not trace into norms of torch.nn, whose check it cannot
                vars(module)['_check_input_dim'] = lambda x: None
        return type(module).forward(module, x, **kwargs)

    def plain(self) -> nn.Module:
        """Return an instance of the original's class with the statistics of this one; nothing is copied."""
        module = self._assemble()
        vars(module)['_modules'] = module._modules | {name: child.plain() for name, child in self.named_children()}
        return module


class SubNets(nn.ModuleDict):
    """What sub-nets have for themselves, by depth and name: the modules whose statistics or parameters are their own.

    A module that several sub-nets run stands with the deepest of them; what is the full-net's is not here.

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


def count_resnet_layers(block: nn.Module, blocks: Sequence[int]) -> int:
    """Count the layers of a ResNet as the field does: those of the blocks, the stem and the classifier.

    Args:
        block: One of its blocks.
        blocks: Number of blocks in every stage.
    """
    return sum(blocks) * (3 if hasattr(block, 'conv3') else 2) + 2


class SharedWeightsMixin:
    """Gives a timm class sub-nets in its own weights, see `DynamicDepthMixin`, which says what a family must define."""

    plain_cls: ClassVar[type[nn.Module]]
    tail_names: ClassVar[tuple[str, ...]] = ()
    head_names: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[int] = 1
    blocks_keep_shape: ClassVar[bool] = True

    def __init__(
            self,
            net: nn.Module,
            subnets: Sequence[Sequence[int]] | None = (),
            depth: int | None = None,
            private: Sequence[str] = (),
    ) -> None:
        """Make a plain net the full-net, whose modules are taken over, and give it sub-nets.

        Args:
            net: Net of the class `plain_cls`.
            subnets: Number of blocks per stage of every sub-net, from 1 to the full-net's. `default_subnets` if None.
            depth: The depth that `forward` runs when it is given none. The full-net's when None.
            private: What sub-nets have for themselves, besides statistics, where their paths have left the full-net's;
                of `PRIVATE`. Without any, the model has exactly the parameters of the full-net.

                * 'affine': scale and shift of norms with running statistics.
                * 'final_norm': norms without statistics, LayerNorm or GroupNorm, behind the last block.
                * 'classifier'.
                * 'conv': the first layer with a matrix of weights in each stage, in ResNets a 3x3 or 1x1 convolution.

        Raises:
            InputError: If a layer has no channels, what is to be private is unknown or not in this net, the blocks of
                a sub-net are not within the full-net's, two nets have the same depth, or no net has the default depth
                asked for.
        """
        self.check(net)
        nn.Module.__init__(self)
        vars(self).update({k: v.copy() if k in vars(self) and hasattr(v, 'copy') else v for k, v in vars(net).items()})
        empty = [name for name, p in self.named_parameters() if not p.numel()]
        if empty:
            raise InputError(f'channels must be at least 1 everywhere, got none in {empty[0]!r}')
        vars(self).setdefault('base_models', [])
        self.grad_checkpointing = any(getattr(m, 'grad_checkpointing', False) for m in self.modules())
        if not (isinstance(private, (tuple, list)) and all(kind in PRIVATE for kind in private)):
            raise InputError(f'private must be a sequence of {PRIVATE}, got {brief(private)}')
        self.private = tuple(private)
        self.subnets = SubNets(next(self.parameters()).device)
        full = self._note_stages()
        self._check_private()
        self._blocks: dict[int, Blocks] = {self.depth_of(full): full}
        self._least = (1,) * len(full) if self.blocks_keep_shape else self._find_least(net)
        self._places: dict[Node, str] = {}
        self._arrange(self._blocks)
        for blocks in self.default_subnets() if subnets is None else subnets:
            self.add_subnet(blocks)
        self.default_depth = self.depths[0]
        self.default_depth = self.resolve_depth(depth)

    @classmethod
    def from_net(cls, net: nn.Module, *args: Any, **kwargs: Any) -> 'SharedWeightsMixin':
        """Make a plain net dynamic, by the arguments of `SharedWeightsMixin` whatever the class itself takes."""
        model = object.__new__(cls)
        SharedWeightsMixin.__init__(model, net, *args, **kwargs)
        return model

    # What a family defines

    def check(self, net: nn.Module) -> None:
        """Refuse plain nets that cannot be of several depths, by an InputError."""

    def stage_names(self) -> list[tuple[str, ...]]:
        """Name, for every stage, the modules that it runs before its blocks, and last the module that holds these."""
        raise NotImplementedError

    def depth_of(self, blocks: Sequence[int]) -> int:
        """Name the depth of a net: by its layers in ResNets, as the field does, by its blocks elsewhere."""
        return sum(blocks)

    # Depths

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
        depths, single = self._match(depth)
        if not (single and depths):
            raise InputError(f'depth must be one of {self.depths}, got {brief(depth)}')
        return depths[0]

    def resolve_depths(self, depth: int | str | Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
        """Resolve the `depth` argument of `forward`.

        Returns:
            Depths in descending order, and whether one depth as such was asked for.

        Raises:
            InputError: If the model has no such depth.
        """
        depths, single = self._match(depth)
        if not depths:
            raise InputError(
                f"depth must be of {self.depths}, a sequence of these, or 'all', got {brief(depth)}")
        return depths, single

    def _match(self, depth: Any) -> tuple[tuple[int, ...], bool]:
        """Find the depths that are asked for, none if one is unknown, and whether it is one depth as such."""
        if depth is None or isinstance(depth, torch.fx.Proxy):
            return (self.default_depth,), True
        if isinstance(depth, str) and depth == 'all':
            return self.depths, False
        single = not isinstance(depth, (tuple, list))
        wanted = (depth,) if single else depth
        # compared one by one, not looked up: torch.compile may hand in a symbolic integer, which this makes a constant
        valid = all(isinstance(w, int) and not isinstance(w, bool) for w in wanted)
        depths = tuple(d for d in self.depths if any(d == w for w in wanted)) if valid else ()
        return (depths if len(depths) >= len(wanted) else ()), single

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """Make a new classifier, as timm's method; those that sub-nets have for themselves become copies of it."""
        super().reset_classifier(*args, **kwargs)
        if 'classifier' not in self.private:
            return
        top = self._classifier_name.partition('.')[0]
        owners = {self._blocks[depth]: depth for depth in reversed(self.depths)}  # pruned nets may have the same blocks
        for blocks, depth in owners.items():
            if depth == self.depths[0]:
                continue
            node = blocks, top
            kept = {
                name: tensor for name, tensor in self._find(self._places[node]).state_dict().items()
                if not f'{top}.{name}'.startswith(f'{self._classifier_name}.')}
            self.subnets[str(depth)]._modules.pop(top, None)
            self._place(depth, node)
            self._find(self._places[node]).load_state_dict(kept, strict=False)
        self._note_ends()

    def get_classifiers(self) -> list[nn.Module]:
        """List the classifier, and those that sub-nets have for themselves."""
        pattern = rf'(subnets\.\d+\.)?{re.escape(self._classifier_name)}'
        return [module for name, module in self.named_modules() if re.fullmatch(pattern, name)]

    # Paths

    def path(self, depth: int) -> list[nn.Module]:
        """List the residual blocks that a depth runs, in order; a block that several depths run is one object.

        Raises:
            InputError: If the model has no such depth.
        """
        return [self._find(step[-1]) for step in self._steps[self.resolve_depth(depth)]]

    def path_norms(self, depth: int) -> list[nn.Module]:
        """List the modules with running statistics that a forward at one depth goes through.

        Raises:
            InputError: If the model has no such depth.
        """
        return find_norms(self._view(self.resolve_depth(depth)))

    def count_shared(self, depth: int, other: int) -> int:
        """Count the blocks that two depths begin with: the same ones, which compute the same maps of the same images.

        Raises:
            InputError: If the model has no such depth.
        """
        return count_shared_blocks(self.blocks(depth), self.blocks(other))

    def find_own(self, name: str) -> list[nn.Module]:
        """List the modules of which a sub-net has something for itself, in a module of the full-net.

        Args:
            name: Name of the module.
        """
        return find_norms(self._find(name)) + [
            module for kind in self.private for module in self._find_private(kind, name)]

    def _check_private(self) -> None:
        """Check that what is to be private is in this net; of classifiers, that may come later."""
        names = [name for stage in self._stages for name in stage] + self._end_names
        for kind in self.private:
            found = any(find_norms(self) if kind == 'affine' else self._find_private(kind, name) for name in names)
            if not found and not (kind == 'classifier' and not self.num_classes):
                raise InputError(f'private must be of what this net has, {type(self).__name__} has no {kind!r}')

    def _find_private(self, kind: str, name: str) -> list[nn.Module]:
        """List the modules, in one of the full-net, whose parameters are a sub-net's own; norms with statistics aside.

        Args:
            kind: One of `PRIVATE`.
            name: Name of the module.
        """
        if kind == 'final_norm' and name.partition('.')[0] in self._end_names:
            return [
                m for m in self._find(name).modules()
                if m._parameters.get('weight') is not None and m.weight.ndim == 1 and not find_norms(m)]
        names = {'classifier': [self._classifier_name], 'conv': self._first_names}.get(kind, [])
        found = [self._find(inner) for inner in names if f'{inner}.'.startswith(f'{name}.')]
        return [module for module in found if module._parameters]

    @torch.no_grad()
    def _find_least(self, net: nn.Module) -> Blocks:
        """Count the blocks of every stage up to the last that changes the shape: by a run on the meta device."""
        containers = [self._find(container) for *_, container in self._stages]
        changing = [{0} for _ in containers]
        handles = [
            block.register_forward_hook(
                lambda _, args, out, s=s, i=i: changing[s].add(i if args[0].shape != out.shape else 0))
            for s, container in enumerate(containers) for i, block in enumerate(container._modules.values())]
        tensors = {
            name: torch.empty_like(t, device='meta') for name, t in (*net.named_parameters(), *net.named_buffers())}
        images = torch.empty(2, net.in_chans, 128, 128, device='meta', dtype=next(net.parameters()).dtype)
        try:
            torch.func.functional_call(net, tensors, (images,))
        finally:
            for handle in handles:
                handle.remove()
        return tuple(max(places) + 1 for places in changing)

    def default_subnets(self) -> list[Blocks]:
        """Choose two thirds and one third of the blocks of each stage, rounded, at least one.

        Raises:
            InputError: If every stage has one block alone.
        """
        full, unit = self._blocks[self.depths[0]], self.unit
        subnets = [
            tuple(
                min(n, max(least, unit * max(1, round(n / unit * thirds / 3))))
                for n, least in zip(full, self._least, strict=True))
            for thirds in (2, 1)]
        distinct = {self.depth_of(blocks): blocks for blocks in subnets if blocks != full}
        if not distinct:
            raise InputError(f'a net must have a stage of more than one block that may be left out, got {full}')
        return list(distinct.values())

    def add_subnet(self, blocks: Sequence[int]) -> int:
        """Add a sub-net; what it has for itself begins as a copy of the full-net's.

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
                f'blocks of a sub-net must be {len(full)} integers, from 1 up to {full}, got {brief(blocks)}')
        for n, least, (*_, container), names in zip(
                blocks, self._least, self._stages, self._block_names, strict=False):
            if n < least:
                raise InputError(
                    f'{container}.{names[least - 1]} changes the shape of its input and cannot be left out: its stage '
                    f'must have at least {least} blocks, got {n} in {tuple(blocks)}')
        blocks, depth = tuple(blocks), self.depth_of(blocks)
        if depth in self._blocks:
            raise InputError(
                f'sub-net {blocks} has depth {depth}, which names the net {self._blocks[depth]} already; '
                f'depths are {self.depths}'
            )
        trained = dict(zip(self.depths, self.subnets.trained, strict=True))
        trained[depth] = torch.zeros_like(self.subnets.trained[0])
        self._arrange(dict(sorted({**self._blocks, depth: blocks}.items(), reverse=True)))
        self.subnets.trained = torch.stack([trained[d] for d in self.depths])
        # timm saves these arguments with the weights: the file then rebuilds this model whatever the defaults are
        subnets = [list(self._blocks[d]) for d in self.depths[1:]]
        self._model_args = dict(getattr(self, '_model_args', {}), subnets=subnets)
        return depth

    def _note_stages(self) -> Blocks:
        """Note where the stages and their blocks are; -> the number of blocks in every stage."""
        self._stages = self.stage_names()
        self._block_names = [list(self._find(container)._modules) for *_, container in self._stages]
        classifier = self.get_classifier()
        self._classifier_name, = (name for name, module in self.named_modules() if module is classifier)
        classifiers = [self._classifier_name.partition('.')[0]] if 'classifier' in self.private else []
        ends = dict.fromkeys([*self.tail_names, *self.head_names, *classifiers])
        self._end_names = [name for name in ends if name in self._modules]
        # The first layer of a stage that has a matrix of weights; that of the first stage is the same at all depths
        self._first_names = [
            next(f'{name}.{key}' for name in names for key, p in self._find(name).named_parameters() if p.ndim > 1
                 ).rpartition('.')[0]
            for names in self._stages[1:]]
        return tuple(map(len, self._block_names))

    def _arrange(self, blocks: dict[int, Blocks]) -> None:
        """Give the nets of these blocks what they need for themselves, and note where every module of theirs is."""
        own = {node: self._find(place) for node, place in self._places.items() if place.startswith('subnets.')}
        self._blocks, self._places = blocks, {}
        self.subnets.clear()
        full = self.depths[0]
        for depth in self.depths:
            if depth != full:
                self.subnets[str(depth)] = nn.ModuleDict()
                self.subnets[str(depth)].training = self.training
            # A module is the same for two nets where their paths to it are; the deepest of them has it
            for node in self._nodes(depth):
                if node not in self._places:
                    self._place(depth, node, own.get(node))
        self._steps = {d: [[self._places[n] for n in step] for step in self._block_nodes(d)] for d in blocks}
        self._note_ends()

    def _place(self, depth: int, node: Node, module: nn.Module | None = None) -> None:
        """Give a depth a module: what it has for itself, made anew if there is none, or the full-net's."""
        name = node[1]
        self._places[node] = name
        if depth != self.depths[0] and self.find_own(name):
            self._places[node] = f'subnets.{depth}.{name}'
            self._put(self.subnets[str(depth)], name, module or SubNetModule(self, name))

    def _note_ends(self) -> None:
        """Note where the tail and the head of every depth are."""
        self._ends = {
            d: tuple([self._places[self._blocks[d], name] for name in self._end_names
                      if (name in self.tail_names) is is_tail] for is_tail in (True, False))
            for d in self.depths}

    def _block_nodes(self, depth: int) -> list[list[Node]]:
        """The blocks of a depth in order, those that begin a stage after what stands before them."""
        blocks, steps = self._blocks[depth], []
        for s, (*before, container) in enumerate(self._stages):
            names = self._block_names[s][:blocks[s]]
            steps += [[(blocks[:s], f'{container}.{name}')] for name in names]
            steps[-len(names)][:0] = [(blocks[:s], name) for name in before]
        return steps

    def _nodes(self, depth: int) -> list[Node]:
        """All that differs or may differ between depths, in the order in which it runs."""
        ends = [(self._blocks[depth], name) for name in self._end_names]
        return [node for step in self._block_nodes(depth) for node in step] + ends

    def _find(self, name: str) -> nn.Module:
        """Look up a module by its name, late: whatever has replaced it since is what runs.

        Raises:
            InputError: If something has replaced a module above it.
        """
        module = self
        for part in name.split('.'):
            if part not in module._modules:
                raise InputError(f'{type(module).__name__} above {name} has no {part}, which depths share: {REFUSAL}')
            module = module._modules[part]
        return module

    @staticmethod
    def _put(net: nn.Module, name: str, module: nn.Module) -> None:
        """Put a module at a place below a dict of modules."""
        *parents, last = name.split('.')
        for parent in parents:
            if parent not in net:
                net[parent] = nn.ModuleDict()
                net[parent].training = net.training
            net = net[parent]
        net[last] = module

    def _view(self, depth: int, plain: bool = False) -> nn.Module:
        """Assemble an instance of the plain class that refers to the modules of one depth.

        Args:
            depth: One of `depths`.
            plain: Whether what the depth has for itself is put in as modules of timm's classes.
        """
        net = object.__new__(self.plain_cls)
        vars(net).update({k: v for k, v in vars(self).items() if k not in self._OWN})
        vars(net).update({k: v.copy() if hasattr(v, 'copy') else v for k, v in _NEW.items()})
        net.training = self.training
        net._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        net._parameters, net._buffers = dict(self._parameters), dict(self._buffers)
        net._modules = {k: v for k, v in self._modules.items() if k != 'subnets'}
        for (*_, container), names, count in zip(self._stages, self._block_names, self._blocks[depth], strict=True):
            stage = _shallow(self._find(container))
            stage._modules = {name: self._find(f'{container}.{name}') for name in names[:count]}
            _replace(net, container, stage)
        for node in self._nodes(depth):
            if self._places[node] != node[1]:
                module = self._find(self._places[node])
                _replace(net, node[1], module.plain() if plain else module)
        return net

    _OWN: ClassVar[frozenset[str]] = frozenset({
        '_block_names', '_blocks', '_classifier_name', '_end_names', '_ends', '_first_names', '_least', '_places',
        '_stages', '_steps', 'default_depth', 'private', 'saved_results',
    })


def _shallow(module: nn.Module) -> nn.Module:
    """Copy a module, but not those in it."""
    new = object.__new__(type(module))
    vars(new).update(vars(module))
    new._modules = dict(module._modules)
    return new


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module in a net that shares its modules with another net, and leave that other one as it is."""
    *parents, last = name.split('.')
    for parent in parents:
        net._modules[parent] = _shallow(net._modules[parent])
        net = net._modules[parent]
    net._modules[last] = module

"""The weights of a full-net and its sub-nets: which modules they share, and what that asks of state dicts.

The forward over them and the extraction of plain nets are in `dynamic_depth.py`.
"""
import copy
import logging
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from timm.models.resnet import Bottleneck
from torch import nn

from ..utils.modules import find_norms

__all__ = ['SharedWeightsMixin']


_logger = logging.getLogger(__name__)
Blocks = tuple[int, ...]


def _twin(block: nn.Module, shared_affine: bool) -> nn.Module:
    """Copy a block so that it shares everything with the original but the statistics of its norms."""
    shared = [m for m in block.modules() if not find_norms(m)]
    if shared_affine:
        shared += block.parameters()
    return copy.deepcopy(block, {id(x): x for x in shared})


def _subnets_in(names: Iterable[str]) -> list[int]:
    return sorted({int(m[1]) for name in names if (m := re.match(r'subnets\.(\d+)\.', name))})


def _remove_aliases(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for alias in module._aliases():
        state_dict.pop(prefix + alias, None)


def _tie_after_load(module: nn.Module, incompatible_keys: Any) -> None:
    module._tie_affine()


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
            ValueError: If the blocks of a sub-net are not within the full-net's, if two nets have the same depth, or
                if no net has the default depth asked for.
        """
        super().__init__(block, layers, **kwargs)
        self._plain_args = {k: v for k, v in kwargs.items() if k not in ('device', 'dtype')} | {'block': block}
        self._layers_per_block = 3 if issubclass(block, Bottleneck) else 2
        self._blocks: dict[int, Blocks] = {self._depth_of(layers): tuple(layers)}
        self.shared_affine = shared_affine
        self.subnets = nn.ModuleDict()
        device = next(self.parameters()).device
        self.subnets.register_buffer('trained', torch.zeros(1, dtype=torch.bool, device=device))
        for blocks in subnets:
            self.add_subnet(blocks)
        self.default_depth = self.depths[0]
        self.default_depth = self.select_depth(depth)
        self.register_state_dict_post_hook(_remove_aliases)
        self.register_load_state_dict_post_hook(_tie_after_load)

    # Nets and depths

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

    def blocks(self, depth: int) -> Blocks:
        """Number of blocks in every stage at a depth.

        Raises:
            ValueError: If the model has no such depth.
        """
        return self._blocks[self.select_depth(depth)]

    def select_depth(self, depth: int | None) -> int:
        """Resolve one depth, None being the default.

        Raises:
            ValueError: If the model has no such depth.
        """
        depths, single = self.select_depths(depth)
        if not single:
            raise ValueError(f'one depth of {self.depths} is expected here, got {depth!r}')
        return depths[0]

    def select_depths(self, depth: int | str | Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
        """Resolve the `depth` argument of `forward`.

        Returns:
            Depths in descending order, and whether one depth as such was asked for.

        Raises:
            ValueError: If the model has no such depth.
        """
        if depth is None or isinstance(depth, torch.fx.Proxy):
            return (self.default_depth,), True
        if isinstance(depth, str) and depth == 'all':
            return self.depths, False
        single = not isinstance(depth, (tuple, list))
        wanted = (depth,) if single else tuple(depth)
        # compared one by one, not looked up: torch.compile may hand in a symbolic integer, which this makes a constant
        depths = tuple(d for d in self.depths if any(d == w for w in wanted))
        if not depths or len(depths) < len(wanted):
            raise ValueError(f"depth must be of {self.depths}, a sequence of these, or 'all', got {depth!r}")
        return depths, single

    def _depth_of(self, blocks: Sequence[int]) -> int:
        return sum(blocks) * self._layers_per_block + 2

    def _stage(self, depth: int, stage: int) -> nn.Sequential:
        name = f'layer{stage + 1}'
        return getattr(self, name) if depth == self.depths[0] else self.subnets[str(depth)][name]

    def path_norms(self, depth: int) -> list[nn.Module]:
        """List the modules with running statistics that a forward at one depth goes through.

        Raises:
            ValueError: If the model has no such depth.
        """
        stages = [self._stage(depth, s) for s in range(len(self.blocks(depth)))]
        return [norm for part in (self.conv1, self.bn1, self.maxpool, *stages) for norm in find_norms(part)]

    def add_subnet(self, blocks: Sequence[int]) -> int:
        """Add a sub-net, its statistics beginning as copies of the full-net's.

        Nothing changes for the other depths. The new one is untrained until it is trained or calibrated.

        Args:
            blocks: Number of blocks per stage, between 1 and the full-net's.

        Returns:
            The depth of the new sub-net.

        Raises:
            ValueError: If the blocks are not within the full-net's, or the model has a net of that depth.
        """
        full = self._blocks[self.depths[0]]
        valid = isinstance(blocks, (tuple, list)) and len(blocks) == len(full) and all(
            type(n) is int and 1 <= n <= most for n, most in zip(blocks, full, strict=True))
        if not valid:
            raise ValueError(f'blocks of a sub-net must be {len(full)} integers, from 1 up to {full}, got {blocks!r}')
        blocks, depth = tuple(blocks), self._depth_of(blocks)
        if depth in self._blocks:
            raise ValueError(
                f'sub-net {blocks} has depth {depth}, which names the net {self._blocks[depth]} already; '
                f'depths are {self.depths}'
            )

        # Two nets run the same block object exactly where their paths from the input are the same.
        known = {
            (path[:s], s, i): module
            for d, path in self._blocks.items() for s in range(len(path)) for i, module in enumerate(self._stage(d, s))
        }
        stages = nn.ModuleDict()
        for s, count in enumerate(blocks):
            originals = self._stage(self.depths[0], s)[:count]
            stages[f'layer{s + 1}'] = nn.Sequential(*(
                known[node] if (node := (blocks[:s], s, i)) in known else _twin(module, self.shared_affine)
                for i, module in enumerate(originals)
            ))
        for container in (stages, *stages.values()):
            container.training = self.training

        trained = dict(zip(self.depths, self.subnets.trained, strict=True))
        trained[depth] = torch.zeros_like(self.subnets.trained[0])
        nets = {**self.subnets, str(depth): stages}
        self._blocks = dict(sorted({**self._blocks, depth: blocks}.items(), reverse=True))
        self.subnets.clear()
        self.subnets.update((str(d), nets[str(d)]) for d in self.depths[1:])
        self.subnets.trained = torch.stack([trained[d] for d in self.depths])
        # timm saves these arguments with the weights: the file then rebuilds this model whatever the defaults are
        subnets = [list(self.blocks(d)) for d in self.depths[1:]]
        self._model_args = dict(getattr(self, '_model_args', {}), subnets=subnets)
        return depth

    # State

    def _aliases(self) -> dict[str, str]:
        """Names under which a tensor is registered again, to the name under which the state dict holds it."""
        first: dict[int, str] = {}
        tensors = chain(self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False))
        names = [(name, first.setdefault(id(tensor), name)) for name, tensor in tensors]
        return {name: kept for name, kept in names if name != kept}

    def _tie_affine(self) -> None:
        """Let twin norms hold the very parameters of the originals again, after something has replaced them."""
        if not self.shared_affine:
            return
        for net in self.subnets.values():
            for name, stage in net.items():
                for twin, block in zip(stage, getattr(self, name), strict=False):
                    for own, original in zip(find_norms(twin), find_norms(block), strict=True):
                        own.weight, own.bias = original.weight, original.bias

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        self._tie_affine()  # leaving the meta device replaces a parameter at every place where it is registered
        return self

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode, as the parent's method."""
        self._tie_affine()  # transformers replaces a parameter at one of its places only, and calls eval() after it
        return super().train(mode)

    def expand_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Complete a state dict to all names of this model, those of shared tensors included.

        Weights of a full-net alone, a stock ResNet or a model without sub-nets, give the sub-nets copies of its
        statistics. In any other state dict a missing entry is an error, the classifier's excepted, which timm takes
        out to adapt weights to other classes.

        Args:
            state_dict: State dict of this model, or of a stock ResNet or a model without sub-nets like the full-net.

        Returns:
            A new dict that refers to the same tensors.

        Raises:
            RuntimeError: If entries are missing, or scale and shift of a sub-net are not those that it would share.
        """
        state_dict, own = dict(state_dict), self.state_dict()
        subnet_names = [name for name in own if name.startswith('subnets.')]
        trained = state_dict.get('subnets.trained')
        held, wanted = _subnets_in(state_dict), _subnets_in(own)
        alone = trained is not None and trained.numel() == 1 < len(self.depths) and not held
        if any(name.startswith('subnets.') for name in state_dict):
            if not set(held) <= set(wanted):
                raise RuntimeError(
                    f'the weights have statistics of sub-nets {held}, the model with depths {self.depths} of {wanted}: '
                    'create it with the sub-nets of the weights, then add_subnet() may add others'
                )
            head = self.get_classifier(name_only=True)
            missing = [
                name for name in own if name not in state_dict and not name.startswith(f'{head}.')
                and not (alone and name.startswith('subnets.'))
            ]
            if missing:
                raise RuntimeError(
                    f'damaged or foreign weights: {len(missing)} of {len(own)} entries of the model with depths '
                    f'{self.depths} are missing, the first being {missing[0]!r}'
                )
        if alone or (state_dict and trained is None):
            for name in subnet_names:
                original = re.sub(r'^subnets\.\d+\.', '', name)
                if original in state_dict:
                    state_dict[name] = state_dict[original].clone()  # load_state_dict may assign it
            state_dict['subnets.trained'] = torch.arange(len(self.depths)) == 0
            if alone:
                state_dict['subnets.trained'] &= trained.cpu()
            parameters = {name for name, _ in self.named_parameters() if name.startswith('layer')}
            if self.depths[1:] and state_dict.keys() >= parameters:  # old files lack `num_batches_tracked`
                _logger.warning(
                    f'Depths {self.depths[1:]} are not trained: these weights hold depth {self.depths[0]} alone. '
                    'Train them, or calibrate their statistics.'
                )
        for alias, name in self._aliases().items():
            if name not in state_dict:
                continue
            given = state_dict.get(alias)
            if given is not None and not given.is_meta and not torch.equal(given, state_dict[name]):
                raise RuntimeError(
                    f'the weights have a scale and shift for every path ({alias!r} is not {name!r}), the model shares '
                    'them: create it with shared_affine=False'
                )
            state_dict[alias] = state_dict[name]
        return state_dict

    def _load_from_state_dict(
            self,
            state_dict: dict,
            prefix: str,
            local_metadata: dict,
            strict: bool,
            missing_keys: list[str],
            unexpected_keys: list[str],
            error_msgs: list[str],
    ) -> None:
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        state_dict.update((prefix + k, v) for k, v in self.expand_state_dict(given).items())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

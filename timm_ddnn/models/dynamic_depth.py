"""Depth-level dynamic networks: a forward that runs one or several depths of the same weights.

How the weights are shared is in `shared_weights.py`, state dicts are in `state_dict.py`, the architectures and
entrypoints in `ddnn_resnet.py`.
"""
import copy
import re
import reprlib
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.models import checkpoint_seq, create_model, is_model
from timm.models._features import feature_take_indices
from timm.models._pretrained import filter_pretrained_cfg
from timm.models.resnet import ResNet
from torch import nn

from ..utils.errors import InputError
from .shared_weights import SubNetModule, count_shared_blocks
from .state_dict import StateDictMixin

__all__ = ['DynamicDepthMixin', 'SubNetOutput']


if TYPE_CHECKING:
    DepthArgument = int | str | Sequence[int] | None
else:
    DepthArgument = Any  # a module traced by torch.fx keeps the annotation, and TorchScript then cannot resolve a union


class SubNetOutput(NamedTuple):
    """What one depth computes.

    Attributes:
        logits: [B, num_classes].
        features: The last feature map of every stage, [B, C_s, H_s, W_s] each.
    """
    logits: torch.Tensor
    features: list[torch.Tensor]


class DynamicDepthMixin(StateDictMixin):
    """Adds sub-nets and a run-time `depth` to a class of the timm ResNet family.

    Sub-net k keeps the first blocks of every stage of the full-net, as in 'Embedded Knowledge Distillation in
    Depth-level Dynamic Neural Network' (arXiv 2103.00793). Two nets share a block, norms included, while their paths
    from the input are the same; after they part, a block's convolutions stay shared and its BatchNorm statistics are
    kept per path. That last choice is this library's, the paper's abstract is silent on it.

    Modifications against the parent class:
        * `subnets` and `depth` arguments, `depths`, `blocks()`, `add_subnet()`, `extract()`
        * `forward*()` take `depth`: None, one depth, several, or 'all'. It is an argument and never a state of the
          model: threads may ask one model for different depths at once
        * the state dict holds the parent's keys plus `subnets.*`, whatever is shared stands in it once
        * a parent's state dict loads as it is; the sub-nets' statistics then start as copies of the full-net's
    """

    # How the name of the plain architecture follows from that of the dynamic one: 'ddnn_resnet50' -> 'resnet50'.
    plain_cls = ResNet
    plain_prefix = ''

    # Forward

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map that the first block takes, [B, C, H', W'], from images [B, C, H, W]."""
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))

    def run_blocks(
            self,
            x: torch.Tensor,
            path: Sequence[nn.Module],
            start: int = 0,
            stops: Collection[int] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Run the blocks of a path, from its beginning or from a map that another depth has computed.

        Args:
            x: The map after `start` blocks; that of `forward_stem` if 0.
            path: Blocks, see `path`.
            start: Number of blocks that have run, see `count_shared`.
            stops: After how many blocks to keep the map; it ends after the last of them. The end of the path if None.

        Returns:
            Maps [B, C, H', W'] by the number of blocks.
        """
        stops = (len(path),) if stops is None else stops
        maps = {start: x} if start in stops else {}
        # no other map is kept once the next is there: on a CPU, fresh memory costs a shallow net 10 % of its time
        for count, block in enumerate(path[start:max(stops)], start=start + 1):
            x = checkpoint_seq([block], x) if self.grad_checkpointing else block(x)
            if count in stops:
                maps[count] = x
        return maps

    def _run_depths(
            self,
            x: torch.Tensor,
            depths: Sequence[int],
            num_stages: int | None = None,
    ) -> dict[int, list[torch.Tensor]]:
        """Compute the last map of every stage at several depths, running what they share once.

        Args:
            x: What `forward_stem` returns.
            depths: Depths to run.
            num_stages: Stop after as many stages.
        """
        blocks = {d: self._blocks[d][:num_stages] for d in depths}
        ends = {d: tuple(accumulate(blocks[d])) for d in depths}
        maps: dict[int, dict[int, torch.Tensor]] = {}
        for i, d in enumerate(depths):
            # It starts from the map behind which its path leaves that of the net before it that it shares most with
            start, source = 0, d
            for e in maps:
                shared = count_shared_blocks(blocks[d], blocks[e])
                if shared > start:
                    start, source = shared, e
            stops = {start, *ends[d], *(count_shared_blocks(blocks[d], blocks[e]) for e in depths[i + 1:])}
            known = {count: y for count, y in maps.get(source, {}).items() if count <= start}
            maps[d] = known | self.run_blocks(known.get(start, x), self._path(d), start, stops)
        return {d: [maps[d][end] for end in ends[d]] for d in depths}

    def forward(
            self,
            x: torch.Tensor,
            depth: DepthArgument = None,
    ) -> torch.Tensor | dict[int, SubNetOutput]:
        """Compute the logits of one depth, or logits and features of several.

        Args:
            x: Images, [B, C, H, W].
            depth: One of `depths`, a sequence of them, 'all', or None for the default depth.

        Returns:
            Logits [B, num_classes] for one depth or None, else a dict from depth to `SubNetOutput` in the order of
            `depths`. What the nets share is computed once.

        Raises:
            InputError: If the model has no such depth.
        """
        depths, single = self.resolve_depths(depth)
        if self.training and torch.is_grad_enabled():
            self.mark_trained(depths)
        if single:
            return super().forward_head(self._forward_features(x, depths[0]))
        maps = self._run_depths(self.forward_stem(x), depths)
        return {d: SubNetOutput(super(DynamicDepthMixin, self).forward_head(maps[d][-1]), maps[d]) for d in depths}

    def forward_features(
            self,
            x: torch.Tensor,
            depth: DepthArgument = None,
    ) -> torch.Tensor | dict[int, torch.Tensor]:
        """Compute the last feature map, [B, C, H, W], of one depth; a dict by depth for several.

        Args:
            x: Images, [B, C, H, W].
            depth: As for `forward`.

        Raises:
            InputError: If the model has no such depth.
        """
        depths, single = self.resolve_depths(depth)
        if single:
            return self._forward_features(x, depths[0])
        return {d: maps[-1] for d, maps in self._run_depths(self.forward_stem(x), depths).items()}

    def _forward_features(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        if depth == self.depths[0]:
            return super().forward_features(x)
        y, = self.run_blocks(self.forward_stem(x), self._path(depth)).values()
        return y

    def forward_head(
            self,
            x: torch.Tensor | dict[int, torch.Tensor],
            pre_logits: bool = False,
            depth: DepthArgument = None,
    ) -> torch.Tensor | dict[int, torch.Tensor]:
        """Pool and classify what `forward_features` returned for the same `depth`; the head is one for all depths.

        Args:
            x: Feature map, [B, C, H, W], or a dict of them by depth.
            pre_logits: Whether to return the pooled features, [B, C], instead of logits, [B, num_classes].
            depth: As for `forward`.

        Raises:
            InputError: If the model has no such depth.
        """
        depths, single = self.resolve_depths(depth)
        if single:
            return super().forward_head(x, pre_logits=pre_logits)
        return {d: super(DynamicDepthMixin, self).forward_head(x[d], pre_logits=pre_logits) for d in depths}

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | Sequence[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            depth: DepthArgument = None,
    ) -> Any:
        """Compute the maps of the stem and the stages, as timm's method of this name; a dict by depth for several.

        Args:
            x: Images, [B, C, H, W].
            indices: Maps to return, 0 being the stem: the last n if an int, all if None.
            norm: Without effect, as in timm's ResNet.
            stop_early: Whether to leave out the stages after the last map wanted.
            output_fmt: 'NCHW'.
            intermediates_only: Whether to return the list of maps alone, without the last map.
            depth: As for `forward`.

        Raises:
            InputError: If the model has no such depth or `output_fmt` is not 'NCHW'.
        """
        if output_fmt != 'NCHW':
            raise InputError(f"output_fmt must be 'NCHW', got {reprlib.repr(output_fmt)}")
        depths, single = self.resolve_depths(depth)
        num_stages = len(self._blocks[depths[0]])
        take, last = feature_take_indices(num_stages + 1, indices)
        stem = self.act1(self.bn1(self.conv1(x)))
        pooled = self.maxpool(stem)
        maps = self._run_depths(pooled, depths, num_stages=last if stop_early else num_stages)

        def collect(features: list[torch.Tensor]) -> Any:
            intermediates = [m for i, m in enumerate([stem, *features]) if i in take]
            return intermediates if intermediates_only else ([pooled, *features][-1], intermediates)

        return collect(maps[depths[0]]) if single else {d: collect(maps[d]) for d in depths}

    # Plain nets

    def extract(self, depth: int | None = None) -> ResNet:
        """Copy one depth out of the model, as a plain net that knows nothing of this library.

        Args:
            depth: One of `depths`, the default depth if None.

        Returns:
            A timm ResNet (of the CIFAR family: a `CifarResNet`) with logits equal to `forward(x, depth=depth)`, and
            with a `pretrained_cfg` under which timm saves and rebuilds it, and with the model's `base_models`.

        Raises:
            InputError: If the model has no such depth.
        """
        depth = self.resolve_depth(depth)
        net = self.plain_cls(layers=self._blocks[depth], device='meta', **self._plain_args)
        attributes = {k: v for k, v in vars(self).items() if k in vars(net) and not k.startswith('_')}
        vars(net).update(copy.deepcopy(attributes))
        for name, stage in net.named_children():
            if not name.startswith('layer'):
                setattr(net, name, copy.deepcopy(getattr(self, name)))
            stage.training = self.training
        places = [(getattr(net, f'layer{s + 1}'), i) for _, s, i in self._nodes(depth)]
        for (stage, i), block in zip(places, self.path(depth), strict=True):
            stage[i] = block.extract() if isinstance(block, SubNetModule) else copy.deepcopy(block)
        if hasattr(self, 'pretrained_cfg'):
            name, args = self._plain_architecture(depth, net)
            cfg = filter_pretrained_cfg(self.pretrained_cfg, remove_source=True)
            net.pretrained_cfg = {**cfg, 'architecture': name, 'num_classes': net.num_classes}
            others = ('label_names', 'label_descriptions') if net.num_classes != cfg.get('num_classes') else ()
            for key in ('tag', *others):
                net.pretrained_cfg.pop(key, None)
            net.default_cfg = net.pretrained_cfg
            net._model_args = args
            net.base_models = list(self.base_models)
        return net

    def _plain_architecture(self, depth: int, net: ResNet) -> tuple[str, dict[str, Any]]:
        """Find timm's name and arguments for the plain net of one depth."""
        own = ('layers', 'subnets', 'depth', 'shared_affine')
        args = {k: v for k, v in getattr(self, '_model_args', {}).items() if k not in own}
        full_name = self.pretrained_cfg['architecture'].removeprefix('ddnn_').removeprefix(self.plain_prefix)
        full_name = self.plain_prefix + full_name
        name = re.sub(r'\d+', str(depth), full_name, count=1)
        # A net of other blocks may be called so, and not take these arguments
        if is_model(name) and _block_counts(create_model(name, device='meta')) == _block_counts(net):
            stock = create_model(name, **{**args, 'num_classes': net.num_classes, 'device': 'meta'})
            if _shapes(stock) == _shapes(net):
                return name, args
        return full_name, {**args, 'layers': list(self._blocks[depth])}

    def __prepare_scriptable__(self) -> nn.Module:
        """Let TorchScript, which has no type for `depth`, compile the plain net of the default depth."""
        return self.extract()

    # The parent's methods that name stages

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameter groups, as timm's method: a sub-net's own parameters go with the block they are for."""
        blocks = r'^(?:subnets\.\d+\.)?layer(\d+)' + ('' if coarse else r'\.(\d+)')
        return dict(super().group_matcher(coarse), blocks=blocks)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, **kwargs: Any) -> list[int]:
        """Remove, at every depth, the stages after the last map wanted, as timm's method."""
        _, last = feature_take_indices(len(self._blocks[self.depths[0]]) + 1, indices)
        take = super().prune_intermediate_layers(indices, **kwargs)
        for net in self.subnets.values():
            for name in [name for name in net if int(name.removeprefix('layer')) > last]:
                del net[name]
        self._blocks = {d: blocks[:last] for d, blocks in self._blocks.items()}
        return take


def _block_counts(net: ResNet) -> list[int]:
    return [len(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]


def _shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}

"""Depth-level dynamic networks: a forward that runs one or several depths of the same weights.

How the weights are shared is in `shared_weights.py`, state dicts are in `state_dict.py`, the families of timm in
`families.py`, architectures and entrypoints in `ddnn_resnet.py` and `ddnn_timm.py`.
"""
import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from timm.models import checkpoint_seq, create_model
from timm.models._pretrained import filter_pretrained_cfg
from torch import nn

from .shared_weights import Blocks, count_shared_blocks
from .state_dict import StateDictMixin

__all__ = ['FAMILIES', 'DynamicDepthMixin', 'SubNetOutput']


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


FAMILIES: dict[type[nn.Module], type['DynamicDepthMixin']] = {}  # by the plain class, which nets must be of exactly


class DynamicDepthMixin(StateDictMixin):
    """Adds sub-nets and a run-time `depth` to a class of timm.

    Sub-net k keeps the first blocks of every stage of the full-net, as in 'Embedded Knowledge Distillation in
    Depth-level Dynamic Neural Network' (arXiv 2103.00793). Two nets share a block, norms included, while their paths
    from the input are the same; after they part, a block's weights stay shared and its BatchNorm statistics are
    kept per path. That last choice is this library's, the paper's abstract is silent on it. LayerNorm and GroupNorm
    have no statistics: of nets that have no other norm everything is shared, but for what is `private`.

    Modifications against the parent class:
        * `subnets`, `depth` and `private` arguments, `depths`, `blocks()`, `add_subnet()`, `extract()`
        * `forward*()` take `depth`: None, one depth, several, or 'all'. It is an argument and never a state of the
          model: threads may ask one model for different depths at once
        * the state dict holds the parent's keys plus `subnets.*`, whatever is shared stands in it once
        * a parent's state dict loads as it is; the sub-nets' statistics then start as copies of the full-net's

    A family of timm is a subclass `DynamicDepthX(DynamicDepthMixin, X)` that says where X has its parts:

    Attributes:
        plain_cls: X, the class of which nets are made dynamic and extracted.
        tail_names: Modules of X that run between the last block and the head, in order.
        head_names: Modules of X that `X.forward_head` runs and that may hold norms.
        blocks_keep_shape: Whether every block but the first of a stage returns the shape that it takes; it is found out
            otherwise, and blocks that do not are in every sub-net.
        unit: By how many blocks the default sub-nets of `make_dynamic` differ.
        depth_argument: Argument of X's entrypoints for the number of blocks per stage, None if there is none.
        feature_cfg: How X's entrypoints build extractors, as `feature_cfg` of timm's `build_model_with_cfg`.
        filter_fn: How X's entrypoints adapt pretrained weights, `pretrained_filter_fn` there.
    """

    plain_prefix: ClassVar[str] = ''  # 'ddnn_resnet20' is 'cifar_resnet20' made dynamic
    depth_argument: ClassVar[str | None] = None
    feature_cfg: ClassVar[Mapping[str, Any]] = {}
    filter_fn: ClassVar[Callable[..., dict[str, torch.Tensor]] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the nets of a family's `plain_cls` known to `make_dynamic`."""
        super().__init_subclass__(**kwargs)
        if 'plain_cls' in vars(cls):
            FAMILIES[cls.plain_cls] = cls

    # What a family defines

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the first stage takes, from images [B, C, H, W]."""
        raise NotImplementedError

    def to_map(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Return what a stage computes as a feature map, [B, C, H', W'].

        Args:
            x: What the last block of the stage returned.
            size: Height and width of the images.
        """
        return x

    @staticmethod
    def blocks_argument(blocks: Blocks) -> list[int] | int:
        """Return the value of `depth_argument` for these blocks per stage."""
        return list(blocks)

    def trim(self, net: nn.Module, blocks: Blocks) -> None:
        """Correct what else a plain net, from which blocks were left out, knows of their number."""

    # Forward

    def run_blocks(
            self,
            x: torch.Tensor,
            depth: int,
            start: int = 0,
            stops: Collection[int] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Run the blocks of a depth, from its beginning or from what another depth has computed.

        Args:
            x: What the first `start` blocks compute; that of `forward_stem` if 0.
            depth: One of `depths`.
            start: Number of blocks that have run, see `count_shared`.
            stops: After how many blocks to keep what they return; it ends after the last of them. All blocks if None.

        Returns:
            What blocks return by the number of blocks, of the shape that they have in the parent class.
        """
        steps = self._steps[depth]
        stops = (len(steps),) if stops is None else stops
        maps = {start: x} if start in stops else {}
        # no other map is kept once the next is there: on a CPU, fresh memory costs a shallow net 10 % of its time
        for count, step in enumerate(steps[start:max(stops)], start=start + 1):
            for name in step:
                module = self._find(name)
                x = checkpoint_seq([module], x) if self.grad_checkpointing else module(x)
            if count in stops:
                maps[count] = x
        return maps

    def _run_depths(self, x: torch.Tensor, depths: Sequence[int]) -> dict[int, list[torch.Tensor]]:
        """Compute what every stage returns at several depths, running what they share once.

        Args:
            x: What `forward_stem` returns.
            depths: Depths to run.
        """
        blocks = {d: self._blocks[d] for d in depths}
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
            maps[d] = known | self.run_blocks(known.get(start, x), d, start, stops)
        return {d: [maps[d][end] for end in ends[d]] for d in depths}

    def forward_tail(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        """Compute what `forward_features` returns from what the last block of a depth returned."""
        for name in self._ends[depth][0]:
            x = self._find(name)(x)
        return x

    def _forward_head(self, x: torch.Tensor, depth: int, **kwargs: Any) -> torch.Tensor:
        own = any(name.startswith('subnets.') for name in self._ends[depth][1])
        return self.plain_cls.forward_head(self._view(depth) if own else self, x, **kwargs)

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
            return self._forward_head(self._forward_features(x, depths[0]), depths[0])
        outputs, features = {}, {}
        for d, stages in self._run_depths(self.forward_stem(x), depths).items():
            # a stage is one object for all depths whose paths to its end are the same
            paths = [self._blocks[d][:s] for s in range(1, len(stages) + 1)]
            for path, y in zip(paths, stages, strict=True):
                if path not in features:
                    features[path] = self.to_map(y, x.shape[-2:])
            logits = self._forward_head(self.forward_tail(stages[-1], d), d)
            outputs[d] = SubNetOutput(logits, [features[path] for path in paths])
        return outputs

    def forward_features(
            self,
            x: torch.Tensor,
            depth: DepthArgument = None,
    ) -> torch.Tensor | dict[int, torch.Tensor]:
        """Compute the last features of one depth, as the parent class; a dict by depth for several.

        Args:
            x: Images, [B, C, H, W].
            depth: As for `forward`.

        Raises:
            InputError: If the model has no such depth.
        """
        depths, single = self.resolve_depths(depth)
        if single:
            return self._forward_features(x, depths[0])
        stages = self._run_depths(self.forward_stem(x), depths)
        return {d: self.forward_tail(maps[-1], d) for d, maps in stages.items()}

    def _forward_features(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        if depth == self.depths[0]:
            return super().forward_features(x)
        y, = self.run_blocks(self.forward_stem(x), depth).values()
        return self.forward_tail(y, depth)

    def forward_head(
            self,
            x: torch.Tensor | dict[int, torch.Tensor],
            pre_logits: bool = False,
            depth: DepthArgument = None,
    ) -> torch.Tensor | dict[int, torch.Tensor]:
        """Pool and classify what `forward_features` returned for the same `depth`.

        Args:
            x: Features of one depth, or a dict of them by depth.
            pre_logits: Whether to return the pooled features, [B, C], instead of logits, [B, num_classes].
            depth: As for `forward`.

        Raises:
            InputError: If the model has no such depth.
        """
        depths, single = self.resolve_depths(depth)
        if single:
            return self._forward_head(x, depths[0], pre_logits=pre_logits)
        return {d: self._forward_head(x[d], d, pre_logits=pre_logits) for d in depths}

    def forward_intermediates(self, x: torch.Tensor, *args: Any, depth: DepthArgument = None, **kwargs: Any) -> Any:
        """Compute intermediate features, as the method of the parent class; a dict by depth for several.

        Args:
            x: Images, [B, C, H, W].
            *args: Arguments of the parent's method, such as `indices`.
            depth: As for `forward`. Several depths run one after the other.
            **kwargs: Arguments of the parent's method.

        Raises:
            InputError: If the model has no such depth.
        """
        depths, single = self.resolve_depths(depth)
        outputs = {d: self.plain_cls.forward_intermediates(self._view(d), x, *args, **kwargs) for d in depths}
        return outputs[depths[0]] if single else outputs

    # Plain nets

    def extract(self, depth: int | None = None) -> nn.Module:
        """Copy one depth out of the model, as a plain net that knows nothing of this library.

        Args:
            depth: One of `depths`, the default depth if None.

        Returns:
            A net of timm's class (of the CIFAR family: a `CifarResNet`) with logits equal to `forward(x, depth=depth)`,
            with a `pretrained_cfg` under which timm saves and rebuilds it, and with the model's `base_models`.

        Raises:
            InputError: If the model has no such depth.
        """
        depth = self.resolve_depth(depth)
        net = copy.deepcopy(self._view(depth, plain=True))
        self.trim(net, self._blocks[depth])
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

    def _plain_architecture(self, depth: int, net: nn.Module) -> tuple[str, dict[str, Any]]:
        """Find a name and arguments that build the plain net of one depth, timm's if it can."""
        for name, args in self._plain_candidates(depth):
            try:
                stock = create_model(name, **{**args, 'num_classes': net.num_classes, 'device': 'meta'})
            except (TypeError, ValueError):  # the entrypoint does not take these arguments
                continue
            if _shapes(stock) == _shapes(net):
                return name, args
        return 'shallow_timm', {**self._plain_args(), 'base': self.base_name, 'blocks': list(self._blocks[depth])}

    def _plain_args(self) -> dict[str, Any]:
        own = ('base', 'blocks', 'subnets', 'depth', 'private', self.depth_argument)
        return {k: v for k, v in getattr(self, '_model_args', {}).items() if k not in own}

    @property
    def base_name(self) -> str:
        """Name of the architecture that was made dynamic."""
        name = self.pretrained_cfg['architecture'].removeprefix('ddnn_').removeprefix(self.plain_prefix)
        return getattr(self, '_model_args', {}).get('base') or self.plain_prefix + name

    def _plain_candidates(self, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.depth_argument:
            yield self.base_name, {
                **self._plain_args(), self.depth_argument: self.blocks_argument(self._blocks[depth])}
        if depth == self.depths[0]:
            yield self.base_name, self._plain_args()

    def __prepare_scriptable__(self) -> nn.Module:
        """Let TorchScript, which has no type for `depth`, compile the plain net of the default depth."""
        return self.extract()

    # The parent's methods that name stages

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups, as timm's method; a sub-net's own go with the module they are for."""
        def extend(pattern: Any) -> Any:
            if isinstance(pattern, str):
                return re.sub(r'^\^', r'^(?:subnets\\.\\d+\\.)?', pattern)
            return [(extend(regex), order) for regex, order in pattern]

        return {group: extend(pattern) for group, pattern in super().group_matcher(coarse).items()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing, as timm's method."""
        super().set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, **kwargs: Any) -> list[int]:
        """Remove, at every depth, what runs after the last features wanted, as timm's method."""
        take = super().prune_intermediate_layers(indices, **kwargs)
        counts = self._note_stages()
        self._arrange({
            d: tuple(min(n, most) for n, most in zip(blocks, counts, strict=False))
            for d, blocks in self._blocks.items()})
        return take


def _shapes(net: nn.Module) -> dict[str, torch.Size | None]:
    return {name: getattr(value, 'shape', None) for name, value in net.state_dict().items()}  # quantized nets hold more

"""The terms of embedded knowledge distillation as pure functions of tensors, and the loss that adds them up."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .models.dynamic_depth import SubNetOutput
from .utils.errors import InputError
from .utils.schema import brief

__all__ = ['EKDLoss', 'attention_map', 'attention_transfer', 'kl_divergence']


ATTENTION_FORMS = ('energy', 'standardized')
MAX_WEIGHT = 1e6  # of a term; float32 holds the sum


def kl_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence of the class posteriors from the teacher's, times temperature squared.

    `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, summed over classes, mean over the batch. The square keeps
    the size of the gradient when the temperature changes (Hinton et al., arXiv 1503.02531). The teacher gets no
    gradient.

    Args:
        logits: Student logits, [B, num_classes].
        teacher_logits: Teacher logits, [B, num_classes].
        temperature: Softmax temperature, > 0.

    Returns:
        A scalar, >= 0.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * temperature ** 2


class _MeanSquare(torch.autograd.Function):
    """Mean of the squares over channels, [B, C, H, W] to [B, H, W].

    Forward and backward pass over the map once each. Autograd's own formulas write several copies of it, some in
    float32, and cost up to ten times as much.
    """

    @staticmethod
    def forward(ctx: Any, feature: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        energy = torch.linalg.vector_norm(feature, dim=1, dtype=dtype).square() / feature.shape[1]
        ctx.save_for_backward(feature, energy)
        return energy

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        feature, energy = ctx.saved_tensors
        # Where all channels are 0 the gradient is 0, also if that of a dead map is too large for float16
        gradient = (gradient * (2 / feature.shape[1])).masked_fill(energy == 0, 0.0)
        return feature * gradient.to(feature.dtype).unsqueeze(1), None


def attention_map(feature: torch.Tensor, form: str = 'energy') -> torch.Tensor:
    """Reduce a feature map to the spatial attention that it pays.

    * 'energy': mean over channels of the squares, L2-normalized per sample (Zagoruyko and Komodakis, arXiv 1612.03928).
    * 'standardized': sum over channels, standardized per sample to mean 0 and (biased) variance 1, with 1e-6 added
      to the variance.

    Args:
        feature: Feature map, [B, C, H, W].
        form: 'energy' or 'standardized'.

    Returns:
        Attention, [B, H*W], in float32 if the map is of a lower precision.

    Raises:
        InputError: If the form is unknown.
    """
    # The reductions take the type of their result: a map of lower precision is never copied as a whole
    dtype = torch.promote_types(feature.dtype, torch.float32)
    if form == 'energy':
        return F.normalize(_MeanSquare.apply(feature, dtype).flatten(1), dim=1)
    if form == 'standardized':
        attention = feature.sum(dim=1, dtype=dtype).flatten(1)
        variance, mean = torch.var_mean(attention, dim=1, correction=0, keepdim=True)
        return (attention - mean) / (variance + 1e-6).sqrt()
    raise InputError(f'attention must be of {ATTENTION_FORMS}, got {brief(form)}')


def attention_transfer(feature: torch.Tensor, teacher_feature: torch.Tensor, form: str = 'energy') -> torch.Tensor:
    """Distance between the attention of two feature maps of one resolution; the teacher gets no gradient.

    Squared differences of `attention_map`, mean over the batch, and over H*W the sum ('energy', at most 2) or the mean
    ('standardized', at most 4). Maps of a single pixel have nothing to compare: their distance is 0.

    Args:
        feature: Student feature map, [B, C, H, W].
        teacher_feature: Teacher feature map, [B, C', H, W].
        form: 'energy' or 'standardized'.

    Returns:
        A scalar, >= 0.

    Raises:
        InputError: If batch or resolution of the maps differ, or the form is unknown.
    """
    _check_resolution(feature, teacher_feature)
    return _distance(attention_map(feature, form), attention_map(teacher_feature.detach(), form), form)


def _check_resolution(feature: torch.Tensor, teacher_feature: torch.Tensor) -> None:
    if feature.shape[0] != teacher_feature.shape[0] or feature.shape[2:] != teacher_feature.shape[2:]:
        raise InputError(
            f'feature maps must have the same batch, height and width, got {tuple(feature.shape)} '
            f'and {tuple(teacher_feature.shape)}'
        )


def _distance(attention: torch.Tensor, teacher_attention: torch.Tensor, form: str) -> torch.Tensor:
    difference = (attention - teacher_attention).square()
    return difference.sum(dim=1).mean() if form == 'energy' else difference.mean()


def _full_precision(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_number(name: str, value: float, low: float, high: float) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and low <= value <= high):
        raise InputError(f'{name} must be a number from {low:g} to {high:g}, got {brief(value)}')
    return float(value)


class EKDLoss(nn.Module):
    """Loss of embedded knowledge distillation: the full-net teaches every sub-net of the same forward.

    With the full-net 0, the sub-nets k, logits z, the last feature map F^s of stage s, and the teacher's side without
    gradient:

        loss = CE(z_0, y) + sum_k w_k [CE(z_k, y) + alpha * T^2 * KL(z_0 || z_k) + beta * sum_s D(a(F_0^s), a(F_k^s))]

    That the full-net teaches by KL divergence of the posteriors and by attention on maps of the same resolution is the
    method of arXiv 2103.00793. The forms of the attention, the weights and the temperature are choices of this
    library: what is at hand of the paper does not give them. So is another teacher, which `terms` takes: it stands in
    the place of z_0 and F_0 in the sum, and the sum is over all depths, the full-net with weight 1.

    The terms are computed in float32 where autocast is on or the outputs are of a lower precision.
    """

    def __init__(
            self,
            temperature: float = 1.0,
            alpha: float = 0.3,
            beta: float = 0.1,
            attention: str = 'energy',
            stages: Sequence[int] | None = (-1,),
            weights: Mapping[int, float] | None = None,
            criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Check and keep the options.

        Args:
            temperature: Softmax temperature T of the KL divergence, from 0.01 to 100: beyond, float32 cannot tell
                posteriors apart.
            alpha: Weight of the KL divergence, from 0 to 1e6. It is not computed if 0.
            beta: Weight of the attention, from 0 to 1e6. It is not computed if 0.
            attention: Form of the attention, 'energy' or 'standardized', see `attention_map`.
            stages: Indices of the stages whose maps are compared, each once, negative ones counting from the last; all
                if None. The last by default.
            weights: Weight w_k by depth, from 0 to 1e6. A depth that is not in it has weight 1.
            criterion: Takes logits [B, num_classes] and the target and returns a scalar, for instance one of
                `timm.loss`. It is applied as it is, to every depth alike. Cross-entropy if None.

        Raises:
            InputError: If an option is out of its range.
        """
        super().__init__()
        if attention not in ATTENTION_FORMS:
            raise InputError(f'attention must be of {ATTENTION_FORMS}, got {brief(attention)}')
        if stages is not None and not (
                isinstance(stages, (tuple, list)) and stages and all(type(s) is int for s in stages)):
            raise InputError(
                f'stages must be one or more indices, or None for all, got {brief(stages)}; beta=0 leaves the '
                'attention out')
        if weights is not None and not (isinstance(weights, Mapping) and all(type(d) is int for d in weights)):
            raise InputError(
                f'weights must be a mapping from depths, integers, to weights, got {brief(weights)}')
        self.temperature = _check_number('temperature', temperature, 0.01, 100)
        self.alpha = _check_number('alpha', alpha, 0, MAX_WEIGHT)
        self.beta = _check_number('beta', beta, 0, MAX_WEIGHT)
        self.attention = attention
        self.stages = None if stages is None else tuple(stages)
        self.weights = {
            d: _check_number(f'weight of depth {d}', w, 0, MAX_WEIGHT) for d, w in (weights or {}).items()}
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion

    def forward(
            self,
            outputs: Mapping[int, SubNetOutput],
            target: torch.Tensor,
            teacher: SubNetOutput | None = None,
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            outputs: What `model(x, depth='all')` returns, or any depths of it. The deepest teaches the others.
            target: Class indices [B] or soft targets [B, num_classes], whichever the criterion takes.
            teacher: Output of another net for the same images, for instance of the averaged weights. It teaches all
                depths, the deepest too.

        Returns:
            A scalar.

        Raises:
            InputError: If the outputs are not a dict by depth, there is a weight for the full-net, the criterion does
                not return a scalar, the teacher has other classes or stages, the maps of a stage differ in resolution,
                or the model has not the stages asked for.
        """
        return self.terms(outputs, target, teacher)['loss']

    def terms(
            self,
            outputs: Mapping[int, SubNetOutput],
            target: torch.Tensor,
            teacher: SubNetOutput | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss and the terms that it is the sum of.

        Args:
            outputs: As for `forward`.
            target: As for `forward`.
            teacher: As for `forward`.

        Returns:
            Scalars with gradient: 'loss'; 'ce_<depth>' for every depth; 'kl_<depth>' (with T^2) and 'attention_<depth>'
            (summed over stages) for every depth that learns from a teacher unless their weight is 0, such that
            loss = sum_k w_k (ce_k + alpha * kl_k + beta * attention_k), with w_0 = 1.

        Raises:
            InputError: As for `forward`.
        """
        if not (isinstance(outputs, Mapping) and outputs and all(
                isinstance(d, int) and isinstance(output, SubNetOutput) for d, output in outputs.items())):
            raise InputError(
                "outputs must be what model(x, depth='all') returns, a dict from depth to SubNetOutput, got "
                f'{type(outputs).__name__}')
        full = max(outputs)
        if full in self.weights:
            raise InputError(f'weights are for sub-nets, the full-net {full} has none; got {self.weights}')
        learning = [d for d in outputs if d != full or teacher is not None]
        teacher = outputs[full] if teacher is None else teacher
        with torch.autocast(outputs[full].logits.device.type, enabled=False):
            logits = {d: _full_precision(output.logits) for d, output in outputs.items()}
            teacher_logits = _full_precision(teacher.logits)
            if teacher_logits.shape != logits[full].shape:
                raise InputError(
                    f'teacher must have logits {tuple(logits[full].shape)}, got {tuple(teacher_logits.shape)}')
            terms = {f'ce_{d}': self._criterion(z, target) for d, z in logits.items()}
            parts = {d: terms[f'ce_{d}'] for d in outputs}
            teacher_maps: dict[int, torch.Tensor] = {}
            for d in learning:
                if self.alpha:
                    terms[f'kl_{d}'] = kl_divergence(logits[d], teacher_logits, self.temperature)
                    parts[d] = parts[d] + self.alpha * terms[f'kl_{d}']
                if self.beta:
                    terms[f'attention_{d}'] = self._attention(outputs[d].features, teacher.features, teacher_maps)
                    parts[d] = parts[d] + self.beta * terms[f'attention_{d}']
            loss = parts.pop(full)
            for d, part in parts.items():
                loss = loss + self.weights.get(d, 1.0) * part
        return {'loss': loss, **terms}

    def _criterion(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = self.criterion(logits, target)
        if loss.ndim != 0:
            raise InputError(
                f'criterion must return a scalar, got shape {tuple(loss.shape)} from {self.criterion}: '
                "give it reduction='mean'"
            )
        return loss

    def _attention(
            self,
            features: Sequence[torch.Tensor],
            teacher: Sequence[torch.Tensor],
            teacher_maps: dict[int, torch.Tensor],
    ) -> torch.Tensor:
        """Sum the distances over the stages; `teacher_maps` keeps the teacher's attention for the next sub-net."""
        if len(features) != len(teacher):
            raise InputError(f'teacher must have maps of {len(features)} stages, got {len(teacher)}')
        stages = range(len(teacher)) if self.stages is None else self.stages
        if any(not -len(teacher) <= s < len(teacher) for s in stages):
            raise InputError(f'stages must be from {-len(teacher)} to {len(teacher) - 1}, got {self.stages}')
        distance = torch.zeros((), device=teacher[0].device)
        for s in sorted({s % len(teacher) for s in stages}):  # each once: 2 and -1 may be the same
            if features[s] is teacher[s]:
                continue  # up to here the sub-net is the full-net
            _check_resolution(features[s], teacher[s])
            if s not in teacher_maps:
                teacher_maps[s] = attention_map(teacher[s].detach(), self.attention)
            distance = distance + _distance(attention_map(features[s], self.attention), teacher_maps[s], self.attention)
        return distance

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f'temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}, attention={self.attention!r}, '
            f'stages={self.stages}, weights={self.weights}'
        )

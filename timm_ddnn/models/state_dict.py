"""State dicts of models with sub-nets: which ones load, and which entries are those of a depth.

A state dict holds the full-net under the names of the stock net, and under `subnets.` what sub-nets have for
themselves.
"""
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch

from ..utils.errors import InputError
from ..weights.weight_checks import check_values, full_net_name
from .shared_weights import SharedWeightsMixin

__all__ = ['StateDictMixin']


_logger = logging.getLogger(__name__)


class StateDictMixin(SharedWeightsMixin):
    """Loads state dicts of the model itself, of a stock net or of a full-net alone, and selects those of a depth."""

    def expand_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Complete a state dict to all names of this model.

        Weights of a full-net alone, a stock net or a model without sub-nets, give the sub-nets copies of what they have
        for themselves, and weights without private parts give copies of what was shared. In any other state dict a
        missing entry is an error, the classifier's excepted, which timm takes out to adapt weights to other classes.

        Args:
            state_dict: State dict of this model, or of a stock net or a model without sub-nets like the full-net.

        Returns:
            A new dict that refers to the same tensors.

        Raises:
            InputError: If entries are missing, or sub-nets have other entries than those of this model.
        """
        state_dict, own = dict(state_dict), self.state_dict()
        if f'{self._classifier_name}.weight' not in own.keys() & state_dict.keys():
            # Weights of other classes, or a model of none: sub-nets go without their classifiers as the full-net does
            state_dict = {
                name: tensor for name, tensor in state_dict.items()
                if not (name.startswith('subnets.') and self._in_classifier(name))}
        trained = state_dict.get('subnets.trained')
        held = _subnets_in(state_dict)
        alone = trained is not None and trained.numel() == 1 < len(self.depths) and not held
        private = {name: full_net_name(name) for name, _ in self.subnets.named_parameters(prefix='subnets')}
        if held or trained is not None:
            if not state_dict.keys() & private.keys():  # shared so far: copies of the full-net's compute the same
                state_dict |= {
                    name: state_dict[full].clone() for name, full in private.items() if full in state_dict}
            self._check_names(state_dict, own, alone)
        if alone or (state_dict and not held and trained is None):
            for name in own:
                original = full_net_name(name)
                if name != original and original in state_dict:
                    state_dict[name] = state_dict[original].clone()  # load_state_dict may assign it
            state_dict['subnets.trained'] = torch.arange(len(self.depths)) == 0
            if alone:
                state_dict['subnets.trained'] &= trained.cpu()
            containers = tuple(f'{container}.' for *_, container in self._stages)
            parameters = {name for name, _ in self.named_parameters() if name.startswith(containers)}
            if self.depths[1:] and state_dict.keys() >= parameters:  # old files lack `num_batches_tracked`
                _logger.warning(
                    f'Depths {self.depths[1:]} are not trained: these weights hold depth {self.depths[0]} alone. '
                    'Train them, or calibrate their statistics.'
                )
        for name, tensor in own.items() if state_dict else ():
            if name.endswith('.num_batches_tracked'):  # files of before PyTorch 0.4.1 and of frozen norms have none
                state_dict.setdefault(name, torch.zeros_like(tensor, device='cpu'))
        return state_dict

    def _in_classifier(self, name: str) -> bool:
        return full_net_name(name).startswith(f'{self._classifier_name}.')

    def _check_names(self, given: Iterable[str], own: Iterable[str], alone: bool) -> None:
        """Refuse weights of other sub-nets, and such as lack entries, though timm loads them non-strictly."""
        held, wanted = _subnets_in(given), _subnets_in(own)
        if not set(held) <= {*wanted, *self.depths}:
            raise InputError(
                f'the weights have statistics of sub-nets {held}, the model with depths {self.depths} of {wanted}: '
                'create it with the sub-nets of the weights, then add_subnet() may add others'
            )
        unknown = [name for name in given if name.startswith('subnets.') and name not in own]
        if unknown:
            private = unknown[0].endswith(('.weight', '.bias'))
            raise InputError(
                f'the weights have {len(unknown)} entries of sub-nets that the model has not, the first being '
                f'{unknown[0]!r}' + private * ': create it with the `private` of the weights'
            )
        adapted = f'{self._classifier_name}.weight' not in given
        missing = [
            name for name in own if name not in given and not (adapted and self._in_classifier(name))
            and not name.endswith('.num_batches_tracked')
            and not (alone and name.startswith('subnets.'))
        ]
        if missing:
            raise InputError(
                f'damaged or foreign weights: {len(missing)} of {len(own)} entries of the model with depths '
                f'{self.depths} are missing, the first being {missing[0]!r}'
            )

    def extract_state_dict(
            self,
            state_dict: dict[str, torch.Tensor],
            depth: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Select from a state dict that of the plain net of one depth.

        Args:
            state_dict: As for `expand_state_dict`.
            depth: One of `depths`, the default depth if None.

        Raises:
            InputError: If the model has no such depth, or as for `expand_state_dict`.
        """
        depth = self.resolve_depth(depth)
        state_dict = self.expand_state_dict(state_dict)
        containers = tuple(f'{container}.' for *_, container in self._stages)
        plain = {
            name: tensor for name, tensor in state_dict.items() if not name.startswith(('subnets.', *containers))}
        for node in self._nodes(depth):
            for prefix in (f'{node[1]}.', f'{self._places[node]}.'):  # what it has for itself comes second
                plain |= {
                    f'{node[1]}.{name.removeprefix(prefix)}': tensor
                    for name, tensor in state_dict.items() if name.startswith(prefix)
                }
        return plain

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        given = self.expand_state_dict(given)
        check_values(given, self.state_dict(), 'the state dict')
        for key in [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in given]:
            del state_dict[key]
        state_dict.update((prefix + k, v) for k, v in given.items())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _subnets_in(names: Iterable[str]) -> list[int]:
    return sorted({int(m[1]) for name in names if (m := re.match(r'subnets\.(\d+)\.', name))})

"""What is watched while a model trains: the terms of its loss, and whether its numbers stay finite."""
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import nn

__all__ = ['LossMeter', 'check_weights']


class LossMeter:
    """Sums the terms of the loss over the steps of an epoch.

    They stay on the device until they are asked for: reading one waits for all the work that was queued there.
    """

    def __init__(
            self,
            accelerator: Accelerator,
            steps: int = 0,
            sums: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Begin an epoch, or go on with one.

        Args:
            accelerator: Accelerator of the run.
            steps: Steps that were done before.
            sums: What `sums` returned after them.
        """
        self.accelerator = accelerator
        self.steps = steps
        self.names = list(sums or ())
        mine = [sums[name][accelerator.process_index] for name in self.names]
        self._sums = torch.tensor(mine, dtype=torch.float32, device=accelerator.device)
        self._finite_steps = torch.full_like(self._sums, steps, dtype=torch.long)

    def update(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the terms of a step, without waiting for them.

        Args:
            terms: What `EKDTask` returns: the terms of the steps before, and maybe others, which have been 0 until
                now. Its key 'output' is passed over.
        """
        self.names += [name for name in terms if name not in ('output', *self.names)]
        values = torch.stack([terms[name].detach() for name in self.names])
        new = len(values) - len(self._sums)
        self._sums = nn.functional.pad(self._sums, (0, new)) + values
        self._finite_steps = nn.functional.pad(self._finite_steps, (0, new), value=self.steps)
        self._finite_steps += self._sums.isfinite()  # a sum that is not finite never becomes so again
        self.steps += 1

    def sums(self) -> dict[str, list[float]]:
        """Sum each term over the steps of each process; to be called by all of them."""
        sums = self.accelerator.gather(self._sums).view(-1, len(self.names))
        return dict(zip(self.names, sums.T.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Average each term over steps and processes; to be called by all processes."""
        return {name: sum(sums) / len(sums) / self.steps for name, sums in self.sums().items()}

    def check(self, epoch: int) -> None:
        """Check that the loss of this process has been finite at every step.

        Args:
            epoch: The epoch, from 0.

        Raises:
            FloatingPointError: If it has not. The message names the first such step, the terms, and their depths.
        """
        first = int(self._finite_steps.min())
        if first == self.steps:
            return
        bad = [name for name, at in zip(self.names, self._finite_steps.tolist(), strict=True) if at == first]
        terms = [name.replace('_', ' of depth ') for name in bad if name != 'loss'] or ['the sum of its terms']
        raise FloatingPointError(f'loss is not finite in epoch {epoch + 1}, step {first + 1}: {", ".join(terms)}')


def check_weights(model: nn.Module, updates: int) -> None:
    """Check that parameters and buffers are finite.

    Args:
        model: The model.
        updates: Updates of its weights so far, for the message.

    Raises:
        FloatingPointError: If one is not. The message names it.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f'{name} is not finite after update {updates}')

"""Loss scaling where the optimizer averages the gradients itself."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from distmuon.optimizer import Muon


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler that also sees the gradients of `Muon(reduce="hook" or "owned")`.

    torch's scalers unscale `p.grad`, which there is not what is used, and each rank decides for
    itself whether it overflowed, so that ranks skip apart and their scales diverge. This one
    unscales the averaged ranges, and all ranks agree on what they found: they skip together and
    keep one scale. For other optimizers, and with reduce="ddp", it is torch's own.
    """

    @override
    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, *rest: bool
    ) -> dict[torch.device, Tensor]:
        # The one place where torch's scaler touches gradients: unscale_() and step() both end here.
        supports = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not (supports and isinstance(optimizer, Muon)):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, *rest)
        found = optimizer.unscale_(float(inv_scale))
        return {found_inf.device: found_inf.fill_(float(found))}

"""AdamW that rounds weights to the nearest bf16 after each step. scripts/benchmarks/proof.py compares with it."""

import torch


class RoundingAdamW(torch.optim.AdamW):
    """Moments stay in float32: nothing but the rounding of the weights differs."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(parameter.bfloat16())
        return loss

"""AdamW that rounds the weights to bf16 after each step. scripts/benchmarks/proof.py compares it with exact masters."""

import torch


class RoundingAdamW(torch.optim.AdamW):
    """AdamW with rounded weights. The moments stay in float32, so only the rounding of the weights differs."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(parameter.bfloat16())
        return loss

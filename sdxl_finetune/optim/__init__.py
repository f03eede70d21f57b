"""From gradients to new weights.

Modules:

    parameters  the trained parameters: learning-rate groups, names, exact values
    freezing    parameters that options freeze or train by name
    optimizer   the optimizer that a config names
    update      sums gradients, clips them and steps, also on exact master weights and in the backward pass
    loss_scale  the factor on the loss in float16 training
    step_unit   whether an optimizer can step on slices, on single tensors, or needs all at once
    lr          the learning rate as a function of the step
    ema, meter  the EMA of the weights, and measurements for the log

Low bits of bf16 weights are in sdxl_finetune/low_bits.py, because loading and saving need them too.
"""

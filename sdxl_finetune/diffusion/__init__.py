"""The mathematics of training, as pure functions: one function for one equation, with its source.

Modules:

    schedule      the noise schedule: alpha-bar, signal-to-noise ratio, noisy latents, velocity
    noise         draws the noise (offset, multires and input noise)
    timesteps     draws the timesteps
    loss          the loss of each element
    loss_weights  the weight of each image's loss, by its timestep
    objective     all of these together: the loss of one batch
"""
